"""Sharing on the Hugging Face hub: a folder, or a model, with its card.

The upload is one commit of `huggingface_hub`. Nothing is changed in the folder: where the card or the adapter's
configuration should read otherwise for the world (a base model's name instead of a path of this machine), the commit
holds the other text.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from ..files import read_json
from .card import CARD, card, is_ours
from .checkpoint import save

log = logging.getLogger(__name__)

LEFT_OUT = ("checkpoints", ".git", ".cache")
"""Folders that stay at home: the state of a training run is for `--resume` here, and many times the adapter's size."""


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
    """Uploads a model or an adapter with its card; returns the address.

    what: the folder of a checkpoint or an adapter, or a model in memory (one with adapters: the adapters alone).
    repo: ``owner/name`` on the hub, made if it is not there.
    base_name: the base model's name on the hub, for a base that the files know as a folder of this machine.
    results: measures for the card, each as ``llmtools evaluate --json`` prints it.
    token: the hub's; by default the one of ``hf auth login`` or HF_TOKEN.

    Raises InputError for something that is no model or adapter, and OSError where the hub refuses or cannot be reached.
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
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode("utf-8")) for name, text in texts.items()
    ]
    operations += [
        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=str(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.relative_to(folder).as_posix() not in texts
        and path.relative_to(folder).parts[0] not in LEFT_OUT
    ]
    api = HfApi(token=token, library_name="llmtools")
    unreached: Any = HfHubHTTPError.__bases__  # HTTPError of the library beneath, whose name changes, and OSError
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message)
    except OSError:  # the hub's own words, or a file here
        raise
    except unreached as error:
        raise ConnectionError(f"{api.endpoint} cannot be reached: {error}") from error
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repo}")


def check_repo(repo: str) -> None:
    """Raises InputError unless `repo` may be a name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"repo {repo!r}: owner/name on the Hugging Face hub is expected ({error})") from error


def texts_of(
    folder: Path, repo: str, *, base_name: str | None = None, results: Sequence[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Name → text of the files that are uploaded other than they lie in the folder: the card, an adapter's base.

    A card in somebody's own words goes up as it is, so it is not among them.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} to share")
    texts = {}
    written = card(folder, name=repo, base_name=base_name, results=results)
    if is_ours(folder / CARD):
        texts[CARD] = written
    elif results:
        raise InputError(f"{folder / CARD} is in your own words; write the results into it, or delete it for a new one")
    path = folder / "adapter_config.json"
    if path.exists():
        config = read_json(path)
        base = config.get("base_model_name_or_path")
        if base_name is not None:
            texts[path.name] = json.dumps(config | {"base_model_name_or_path": base_name}, indent=2) + "\n"
        elif base and Path(str(base)).expanduser().exists():
            log.warning(
                "the adapter names its base model by a path of this machine (%s); others need its name on the hub: "
                "--base_name NAME",
                base,
            )
    return texts


def _save_any(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    told: Any = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        told.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    else:
        save(model, tokenizer, folder)
