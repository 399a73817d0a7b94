"""Let a model write: what follows each prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Generate:
    """What follows a prompt, from a model with or without an adapter."""

    model: str | None = None
    """folder or hub name, quantized or not; by default what the adapter was trained on"""
    adapter: str | None = None
    """folder of an adapter"""
    load: str | None = None
    """nf4 or int8: quantize a plain model with bitsandbytes while it loads; by default as the adapter was trained"""
    prompt: str | None = None
    """the words to go on from"""
    prompts: str | None = None
    """a .txt or .jsonl file of prompts instead: one a line, or the "prompt" of each row"""
    max_new_tokens: int = 128
    """how many tokens to write at most"""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn"""
    top_p: float = 1.0
    """draw from the likeliest tokens that make up this share"""
    seed: int = 0
    """of the drawing"""
    raw: bool = False
    """take the prompt as it stands, even if the adapter was trained with a template or on chats"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, if the checkpoint was made with it"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class Completion:
    """A prompt, as the model saw it, and what it wrote."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Generated:
    """Everything that was written."""

    model: str
    adapter: str | None
    completions: list[Completion]

    def __str__(self) -> str:
        return "\n\n".join(f"{one.prompt}{one.completion}" for one in self.completions)


def generate(recipe: Generate) -> Generated:
    """Writes on from each prompt."""
    prompts = _prompts(recipe)
    if recipe.temperature < 0 or not 0 < recipe.top_p <= 1 or recipe.max_new_tokens < 1:
        raise InputError(
            f"temperature={recipe.temperature}, top_p={recipe.top_p}, max_new_tokens={recipe.max_new_tokens}: "
            f"at least 0, above 0 and at most 1, and at least 1 are expected"
        )
    from ..data.generation import complete
    from ..progress import progress
    from .loading import import_plugins, loaded_as, model_and_adapter, open_model, quiet_libraries, words_of

    name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    quiet_libraries()
    import_plugins(recipe.plugin)
    load = loaded_as(recipe.load, name, adapter)
    model, tokenizer = open_model(name, adapter=adapter, load=load, trust_remote_code=recipe.trust_remote_code)
    words = {} if recipe.raw else words_of(adapter)
    chat = words.get("form") == "messages" and bool(tokenizer.chat_template)
    if not recipe.raw:
        prompts = [_in_words(prompt, words, tokenizer) for prompt in prompts]
    with progress("generate", unit="prompts") as step:
        outputs = complete(
            model,
            tokenizer,
            prompts,
            max_new_tokens=recipe.max_new_tokens,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            seed=recipe.seed,
            chat=chat,
            on_step=step if len(prompts) > 1 else None,
        )
    completions = [Completion(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    return Generated(name, adapter, completions)


def _prompts(recipe: Generate) -> list[str]:
    if (recipe.prompt is None) == (recipe.prompts is None):
        raise InputError('pass one of the two: --prompt "some words", or --prompts FILE')
    if recipe.prompt is not None:
        return [recipe.prompt]
    from ..data.reading import enumerate_rows, existing_file, kind

    path = existing_file(Path(str(recipe.prompts)))
    if kind(path) == "txt":
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        prompts = []
        for number, row in enumerate_rows(path):
            if not isinstance(row.get("prompt"), str):
                raise InputError(f'{path}:{number}: the row has no "prompt" (its keys: {", ".join(row) or "none"})')
            prompts.append(row["prompt"])
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def _in_words(prompt: str, words: dict[str, Any], tokenizer: Any) -> str:
    """The prompt in the words that the adapter was trained with: its template's only field, or a chat's first turn."""
    from ..data.tasks.base import in_chat_template, template_fields

    if words.get("form") == "messages" and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        return str(in_chat_template(turn, tokenizer, where="prompt", tokenize=False, add_generation_prompt=True))
    template = (words.get("template") or {}).get("prompt")
    if template:
        fields = set(template_fields(template, "the adapter's run.json"))
        if len(fields) == 1:
            return str(template.format_map({fields.pop(): prompt}))
    return prompt
