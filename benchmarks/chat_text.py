"""Instructions as chats in a model's template, a line of JSON each: calibration text for `benchmarks.real`.

    python -m benchmarks.chat_text --model FOLDER --data alpaca_data.json.gz --out chats.jsonl
    python -m benchmarks.real … --calibration chats=chats.jsonl

data: records with instruction, input and output, as Stanford Alpaca's.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from transformers import AutoTokenizer

from llmtools.data.tasks.base import tasks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with a tokenizer that has a chat template")
    parser.add_argument("--data", required=True, help="file or folder of instructions")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--samples", type=int, default=4000, help="number of chats, chosen at random")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    rows = tasks.get("alpaca")(data=args.data).rows("train")
    chosen = random.Random(0).sample(rows, min(args.samples, len(rows)))
    with args.out.open("w", encoding="utf-8") as file:
        for row in chosen:
            asked = "\n\n".join(str(row[key]) for key in ("instruction", "input") if str(row.get(key) or "").strip())
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(row["output"])}]
            file.write(json.dumps({"text": tokenizer.apply_chat_template(chat, tokenize=False)}) + "\n")
    print(f"{args.out}: {len(chosen)} chats")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
