"""Let a model write: what follows each prompt."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generate:
    """Generate text from a prompt, with or without an adapter; a chat model answers in its chat template."""

    model: str | None = None
    """folder or hub name, quantized or not; by default what the adapter was trained on"""
    adapter: str | None = None
    """folder of an adapter"""
    load: str | None = None
    """nf4 or int8: quantize a plain model with bitsandbytes while it loads; by default as the adapter was trained"""
    prompt: str | None = None
    """the prompt: a question to a chat model, or the beginning of a text"""
    system: str | None = None
    """system prompt of a chat model; by default the one that all chats had which the adapter was trained on"""
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
    """take the prompt as it stands: no chat template, and no prompt template that the adapter was trained with"""
    plugin: str | list[str] | None = None
    """module:Class of your own quantizer, if the checkpoint was made with it"""
    allow_other_base: bool = False
    """permission to open the adapter on another base than the one it was trained on, with a warning"""
    verify: bool = False
    """comparison of every byte of the model's (and adapter's) files with their checksums before they are used"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(frozen=True)
class Completion:
    """A prompt, as the model saw it, and what it generated."""

    prompt: str
    completion: str
    tokens: int
    """number of tokens generated, an end-of-text token included"""
    chat: bool = False
    """whether the prompt is in the chat template"""


@dataclass(frozen=True)
class Generated:
    """Everything that was generated."""

    model: str
    adapter: str | None
    completions: list[Completion]

    def __str__(self) -> str:
        return "\n\n".join(one.completion if one.chat else f"{one.prompt}{one.completion}" for one in self.completions)


def generate(recipe: Generate) -> Generated:
    """Writes on from each prompt."""
    prompts = _prompts(recipe)
    if recipe.temperature < 0 or not 0 < recipe.top_p <= 1 or recipe.max_new_tokens < 1:
        raise InputError(
            f"temperature={recipe.temperature}, top_p={recipe.top_p}, max_new_tokens={recipe.max_new_tokens}: "
            f"at least 0, above 0 and at most 1, and at least 1 are expected"
        )
    from ..checkpoint.loading import (
        import_plugins,
        loaded_as,
        model_and_adapter,
        open_model,
        prompt_format_of,
        quiet_libraries,
    )
    from ..data.generation import generate_completions
    from ..progress import progress

    name, adapter = model_and_adapter(recipe.model, recipe.adapter)
    quiet_libraries()
    import_plugins(recipe.plugin)
    load = loaded_as(recipe.load, name, adapter)
    model, tokenizer = open_model(
        name,
        adapter=adapter,
        load=load,
        trust_remote_code=recipe.trust_remote_code,
        verify=recipe.verify,
        allow_other_base=recipe.allow_other_base,
    )
    template = {} if recipe.raw else prompt_format_of(adapter)
    chat = not recipe.raw and _is_chat(template, adapter, tokenizer)
    system = recipe.system if recipe.system is not None else template.get("system_prompt")
    if recipe.system is not None and not chat:
        raise InputError(
            "--system goes with a chat template, which this model or adapter is not asked in; leave it out"
        )
    if chat:
        _say_what_differs(template, system, tokenizer)
        prompts = [_as_chat(prompt, system, tokenizer) for prompt in prompts]
    elif not recipe.raw:
        prompts = [_in_template(prompt, template) for prompt in prompts]
    with progress("generate", unit="prompts") as step:
        outputs = generate_completions(
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
    total = sum(output.tokens for output in outputs)
    log.info("%d token%s generated", total, "s" * (total != 1))
    if silent := sum(not output.text.strip() for output in outputs):
        log.warning(
            "%d of %d answers are empty: the model ended the text at once%s",
            silent,
            len(outputs),
            "" if chat or not tokenizer.chat_template else "; without --raw it is asked in its chat template",
        )
    completions = [
        Completion(prompt, output.text, output.tokens, chat) for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return Generated(name, adapter, completions)


def _prompts(recipe: Generate) -> list[str]:
    if (recipe.prompt is None) == (recipe.prompts is None):
        raise InputError('pass one of the two: --prompt "some words", or --prompts FILE')
    if recipe.prompt is not None:
        return [recipe.prompt]
    from ..data.text_io import enumerate_rows, existing_file, kind

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


def _is_chat(template: dict[str, Any], adapter: str | None, tokenizer: Any) -> bool:
    """Whether prompts go through the chat template: with an adapter if it was trained on chats."""
    if not tokenizer.chat_template:
        return False
    form = template.get("record_format")
    return form == "messages" if adapter is not None and form is not None else True


def _say_what_differs(trained: dict[str, Any], system: str | None, tokenizer: Any) -> None:
    """Warns where chats had another system prompt, or another chat template, when the adapter was trained."""
    from ..checkpoint.loading import content_of_template

    if "system_prompt" in trained and (trained["system_prompt"] or None) != (system or None):
        other = (
            f"with another system prompt: {trained['system_prompt']!r}"
            if trained["system_prompt"]
            else "without a system prompt"
        )
        log.warning("the adapter was trained %s", other)
    if trained.get("chat_template") not in (None, content_of_template(tokenizer.chat_template)):
        log.warning("the adapter was trained in another chat template than that of this model's tokenizer")


def _as_chat(prompt: str, system: str | None, tokenizer: Any) -> str:
    """The prompt as a user's message, opened for an answer."""
    from ..data.tasks.base import in_chat_template

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return str(in_chat_template(messages, tokenizer, where="prompt", tokenize=False, add_generation_prompt=True))


def _in_template(prompt: str, template: dict[str, Any]) -> str:
    """The prompt in the template that the adapter was trained with, if that has one field to put it in."""
    from ..data.tasks.base import template_fields

    text = (template.get("template") or {}).get("prompt")
    fields = set(template_fields(text, "the adapter's run.json")) if text else set()
    return str(text).format_map({fields.pop(): prompt}) if len(fields) == 1 else prompt
