"""Upload a model or an adapter to the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Push:
    """Upload a folder (a model or an adapter) to the Hugging Face hub, with a model card from its metadata."""

    folder: str
    """Folder that `llmtools quantize`, `finetune` or `export` wrote."""
    repo: str
    """Repository on the hub as owner/name; created if it does not exist."""
    private: bool = False
    """Whether a new repository is private."""
    base_name: str | None = None
    """Name of the base model on the hub, where the files only name a folder of this machine."""
    results: str | list[str] | None = None
    """File, or list of files, of `llmtools evaluate --json > FILE` for this folder: metrics for the model card."""
    message: str = "Upload with llmtools"
    """Commit message."""
    dry_run: bool = False
    """Output of the model card and the names of the files, without an upload."""


@dataclass(frozen=True)
class PushResult:
    """The repository's address, or the outcome of a dry run."""

    repo: str
    """Repository on the hub."""
    url: str | None
    """Address of the commit, None where nothing was uploaded."""
    card: str | None = None
    """Model card, of a dry run."""
    files: list[str] = field(default_factory=list)
    """Files that would be uploaded, of a dry run."""
    left_out: list[str] = field(default_factory=list)
    """Files that would not be uploaded, of a dry run."""

    def __str__(self) -> str:
        if self.card is None:
            return f"{self.repo}: {self.url}"
        lines = [f"{self.repo} would get: {', '.join(self.files)}"]
        lines += [f"these would not be uploaded: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([self.card, *lines])


def push(recipe: Push) -> PushResult:
    """Uploads the folder. Raises InputError for a folder that llmtools did not write, and results of another one."""
    from ..checkpoint.model_card import CARD
    from ..checkpoint.upload import check_repo, files_of, push_to_hub, texts_of

    check_repo(recipe.repo)
    folder = Path(recipe.folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} (looked in {Path.cwd()})")
    files = [recipe.results] if isinstance(recipe.results, str) else recipe.results or []
    results = [_result(Path(name).expanduser(), folder) for name in files]
    if recipe.dry_run:
        texts = texts_of(folder, recipe.repo, base_name=recipe.base_name, results=results)
        kept, left = files_of(folder)
        card = texts.get(CARD) or (folder / CARD).read_text(encoding="utf-8")
        return PushResult(recipe.repo, None, card, sorted({*kept, *texts}), left)
    url = push_to_hub(
        folder,
        recipe.repo,
        private=recipe.private or None,
        base_name=recipe.base_name,
        results=results,
        message=recipe.message,
    )
    return PushResult(recipe.repo, url)


def _result(path: Path, folder: Path) -> dict[str, Any]:
    """One evaluation's result. Raises InputError unless the file holds one, of this folder."""
    try:
        result = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not what `llmtools evaluate --json` prints: {error}") from error
    if not {"task", "measure", "value", "model"} <= set(result):
        raise InputError(
            f"{path} is not what `llmtools evaluate --json` prints: it has {', '.join(result) or 'nothing'}"
        )
    evaluated = result.get("adapter") or result["model"]
    if Path(str(evaluated)).expanduser().resolve() != folder.resolve():
        raise InputError(f"{path} is an evaluation of {evaluated}, not of {folder}")
    return result
