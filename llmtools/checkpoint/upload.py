"""Upload of a folder, or a model, to the Hugging Face hub, with its card.

The upload is one commit of `huggingface_hub` with the files that belong to a model or an adapter (`UPLOADED`) and no
others: hidden files, further files in the folder and targets of symbolic links outside of it are not uploaded. The
folder is not changed: where the card, the adapter's configuration or the metadata must differ for the public (a base
model's hub name instead of a local path, no token), the commit holds the changed text.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from ..files import METADATA, RUN, read_json
from ..formats.gguf_reading import hub_base
from ..redaction import redacted
from .folder import save
from .model_card import CARD, card, is_ours

log = logging.getLogger(__name__)

UPLOADED = (
    *("config.json", "generation_config.json", "quantize_config.json", "quant_config.json"),
    *("model*.safetensors", "model*.safetensors.index.json", "*.gguf"),
    *("adapter_config.json", "adapter_model*.safetensors", "adapter_model.safetensors.index.json"),
    "base_fingerprint.json",
    *("lora_start.safetensors", "llmtools.json", "run.json", "metrics.jsonl", "loss.png"),
    *("README.md", "LICENSE*", "NOTICE*"),
    # tokenizers, by transformers' file names, and processors
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model", "*.spm"),
    *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "*.tiktoken", "prophetnet.tokenizer"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "word_shape.json"),
    *("word_pronunciation.json", "normalizer.json", "emoji.json", "byte_maps.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Patterns of the names of uploaded files."""


def push_to_hub(
    what: str | PathLike[str] | nn.Module,
    repo: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    base_name: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    token: str | bool | None = None,
    message: str = "Upload with llmtools",
) -> str:
    """Uploads a model or an adapter with its card; returns the URL.

    what: the folder of a checkpoint or an adapter, or a model in memory (one with adapters: the adapters alone).
    repo: ``owner/name`` on the hub, created if it does not exist.
    base_name: the base model's name on the hub, for a base that the files name by a local path.
    results: measures for the card, each as ``llmtools evaluate --json`` prints it.
    token: the hub's; by default the one of ``hf auth login`` or HF_TOKEN.

    Raises InputError for a folder without a model or adapter, and OSError where the hub refuses or cannot be reached.
    """
    check_repo(repo)
    if isinstance(what, nn.Module):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / repo.rpartition("/")[2]
            _save_any(what, tokenizer, folder)
            return push_to_hub(
                folder, repo, private=private, base_name=base_name, results=results, token=token, message=message
            )
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(what).expanduser()
    texts = texts_of(folder, repo, base_name=base_name, results=results)
    files, others = files_of(folder)
    if others:
        log.info("not uploaded, no part of a model or adapter: %s", ", ".join(others))
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode("utf-8")) for name, text in texts.items()
    ]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        for name, path in files.items()
        if name not in texts
    ]
    api = HfApi(token=token, library_name="llmtools")
    unreached: Any = HfHubHTTPError.__bases__  # HTTPError of the HTTP library, which changes with versions, and OSError
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message)
    except OSError:  # a response of the hub, or a local file
        raise
    except unreached as error:
        raise ConnectionError(f"{api.endpoint} cannot be reached: {error}") from error
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repo}")


def check_repo(repo: str) -> None:
    """Raises InputError unless `repo` is a valid repository name on the hub, with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"repo {repo!r}: owner/name on the Hugging Face hub is expected ({error})") from error
    if repo.count("/") != 1:
        raise InputError(f"repo {repo!r}: owner/name on the Hugging Face hub is expected, with the owner")


def files_of(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """(name → path of each file to upload, names of the others); names of folders end in a slash."""
    files: dict[str, Path] = {}
    others: list[str] = []
    known = {pattern.partition("/")[0] for pattern in UPLOADED if "/" in pattern}
    for path in sorted(folder.iterdir()):
        inside = path.name in known and path.is_dir() and not path.is_symlink()
        for each in sorted(path.iterdir()) if inside else [path]:
            name = each.relative_to(folder).as_posix()
            if _belongs(name) and each.is_file() and _is_of(each.resolve(), folder):
                files[name] = each
            else:
                others.append(f"{name}/" if each.is_dir() else name)
    return files, others


def _belongs(name: str) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in UPLOADED) and not (
        name.rpartition("/")[2].startswith(".")
    )


def _is_of(target: Path, folder: Path) -> bool:
    """Whether a resolved path is a file of the folder, or a blob that the hub's cache stores for it."""
    home = folder.resolve()
    if target.is_relative_to(home):
        return _belongs(target.relative_to(home).as_posix())
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"


def texts_of(
    folder: Path, repo: str, *, base_name: str | None = None, results: Sequence[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Name → text of the files whose upload differs from the folder: card, adapter's configuration, metadata.

    An edited card is uploaded unchanged, so it is not among them.

    Raises InputError where there is no folder, or the card was edited and results are to be added.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} to upload")
    texts = {}
    written = card(folder, name=repo, base_name=base_name, results=results)
    if is_ours(folder / CARD):
        texts[CARD] = written
    elif results:
        raise InputError(f"{folder / CARD} was edited; write the results into it, or delete it for a new one")
    files, _ = files_of(folder)
    for name in {METADATA, RUN} & files.keys():
        run = read_json(files[name])
        rewritten = base_name is not None and "adapter_config.json" in files
        if (public := redacted(run)) != run or rewritten:  # files of earlier versions may hold secrets
            public.pop("checksums", None)  # of the unchanged files
            texts[name] = json.dumps(public, indent=2, ensure_ascii=False) + "\n"
    if "adapter_config.json" in files:
        path = files["adapter_config.json"]
        config = read_json(path)
        base = config.get("base_model_name_or_path")
        if base_name is not None:
            named = config | {"base_model_name_or_path": hub_base(base_name, config)}
            texts[path.name] = json.dumps(named, indent=2) + "\n"
        elif base and Path(str(base)).expanduser().exists():
            log.warning(
                "the adapter names its base model by a local path (%s); give its name on the hub with --base_name NAME",
                base,
            )
    return texts


def _save_any(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    adapted: Any = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        adapted.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        save(model, tokenizer, folder)
