"""PEFT: merge_and_unload and save_pretrained, as its documentation shows."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import peer


class Peft(peer.Peer):
    """The model is loaded in the dtype of its files."""

    packages = ("peft", "transformers", "torch")
    imports = ("peft", "transformers")

    def refusal(self, job: peer.Job) -> str | None:
        return (
            None if peer.kinds(job) == {"peft"} and len(job["adapters"]) == 1 else "no PEFT adapter of a language model"
        )

    def fuse(self, job: peer.Job, folder: Path, output: Path, variant: str) -> None:
        del folder, variant
        torch, peft = import_module("torch"), import_module("peft")
        auto = import_module("transformers").AutoModelForCausalLM
        model = auto.from_pretrained(job["base"], dtype=torch.bfloat16, local_files_only=True)
        merged = peft.PeftModel.from_pretrained(model, job["adapters"][0]["path"]).merge_and_unload()
        merged.save_pretrained(output, max_shard_size="500MB")


if __name__ == "__main__":
    peer.main(Peft)
