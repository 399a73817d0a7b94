"""Generate text from prompts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.options import AdaptedModelOptions, OffloadOptions
from ..errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generate(AdaptedModelOptions, OffloadOptions):
    """Generate text from a prompt, with or without an adapter; a chat model answers in its chat template."""

    load: str | None = None
    """Quantization by bitsandbytes while an unquantized model loads: nf4 or int8; by default as the adapter was
    trained."""
    prompt: str | None = None
    """Prompt: a user message to a chat model, or the beginning of a text."""
    system: str | None = None
    """System prompt of a chat model; by default the one of all chats that the adapter was trained on."""
    prompts: str | None = None
    """File of prompts instead: a .txt with one per line, or a .jsonl with a "prompt" per row."""
    max_new_tokens: int = 128
    """Maximum number of tokens to generate per prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Probability mass of the tokens to sample from (nucleus sampling)."""
    seed: int = 0
    """Seed of the sampling."""
    raw: bool = False
    """Prompt as it is given, without the chat template and the prompt template that the adapter was trained with."""


@dataclass(frozen=True)
class Completion:
    """A prompt, as the model was given it, and what it generated."""

    prompt: str
    """Prompt in its template."""
    completion: str
    """Generated text."""
    tokens: int
    """Number of tokens generated, an end-of-text token included."""
    chat: bool = False
    """Whether the prompt is in the chat template."""


@dataclass(frozen=True)
class GenerateResult:
    """The completions, in the order of the prompts."""

    model: str
    """Folder or hub name of the model."""
    adapter: str | None
    """Folder of the adapter."""
    completions: list[Completion]
    """Completion of each prompt."""

    def __str__(self) -> str:
        return "\n\n".join(one.completion if one.chat else f"{one.prompt}{one.completion}" for one in self.completions)


def generate(recipe: Generate) -> GenerateResult:
    """Generates a completion of each prompt."""
    prompts = _prompts(recipe)
    if recipe.temperature < 0 or not 0 < recipe.top_p <= 1 or recipe.max_new_tokens < 1:
        raise InputError(
            f"temperature={recipe.temperature}, top_p={recipe.top_p}, max_new_tokens={recipe.max_new_tokens}: "
            f"at least 0, above 0 and at most 1, and at least 1 are expected"
        )
    from ..checkpoint.loading import compute_fast, open_recipe, prompt_format_of
    from ..data.generation import generate_completions
    from ..progress import progress

    model, tokenizer, name, adapter = open_recipe(recipe)
    compute_fast(model, recipe.offload)
    template = {} if recipe.raw else prompt_format_of(adapter)
    chat = not recipe.raw and _is_chat(template, adapter, tokenizer)
    system = recipe.system if recipe.system is not None else template.get("system_prompt")
    if recipe.system is not None and not chat:
        raise InputError(
            "--system goes with a chat template, which this model or adapter is not prompted with; leave it out"
        )
    if chat:
        _warn_of_differences(template, system, tokenizer)
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
    if empty := sum(not output.text.strip() for output in outputs):
        log.warning(
            "%d of %d answers are empty: the model ended the text at once%s",
            empty,
            len(outputs),
            "" if chat or not tokenizer.chat_template else "; without --raw it is prompted in its chat template",
        )
    completions = [
        Completion(prompt, output.text, output.tokens, chat) for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return GenerateResult(name, adapter, completions)


def _prompts(recipe: Generate) -> list[str]:
    if (recipe.prompt is None) == (recipe.prompts is None):
        raise InputError('pass one of the two: --prompt "TEXT", or --prompts FILE')
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
    """Whether prompts are put into the chat template: with an adapter, if it was trained on chats."""
    if not tokenizer.chat_template:
        return False
    record_format = template.get("record_format")
    return record_format == "messages" if adapter is not None and record_format is not None else True


def _warn_of_differences(trained: dict[str, Any], system: str | None, tokenizer: Any) -> None:
    """Warns where the adapter was trained with another system prompt or chat template."""
    from ..checkpoint.loading import content_of_template

    if "system_prompt" in trained and (trained["system_prompt"] or None) != (system or None):
        other = (
            f"with another system prompt: {trained['system_prompt']!r}"
            if trained["system_prompt"]
            else "without a system prompt"
        )
        log.warning("the adapter was trained %s", other)
    if trained.get("chat_template") not in (None, content_of_template(tokenizer.chat_template)):
        log.warning("the adapter was trained with another chat template than that of this model's tokenizer")


def _as_chat(prompt: str, system: str | None, tokenizer: Any) -> str:
    """The prompt as a user message, with the generation prompt after it."""
    from ..data.tasks.base import in_chat_template

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return str(in_chat_template(messages, tokenizer, where="prompt", tokenize=False, add_generation_prompt=True))


def _in_template(prompt: str, template: dict[str, Any]) -> str:
    """The prompt in the prompt template that the adapter was trained with, if that has exactly one field."""
    from ..data.tasks.base import template_fields

    text = (template.get("template") or {}).get("prompt")
    fields = set(template_fields(text, "the adapter's run.json")) if text else set()
    return str(text).format_map({fields.pop(): prompt}) if len(fields) == 1 else prompt
