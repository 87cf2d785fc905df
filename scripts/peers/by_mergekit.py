"""mergekit: a linear merge of two language models, as mergekit-yaml does it with its default options."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import peer


class Mergekit(peer.Peer):
    """Computes in the stored dtype unless it is told otherwise: so does this."""

    packages = ("mergekit", "torch", "transformers")
    imports = ("mergekit.merge",)
    merges = True

    def refusal(self, job: peer.Job) -> str | None:
        if "other" not in job:
            return "fuses no adapters but as part of a merge"
        return None if Path(job["base"]).is_dir() else "merges models of transformers alone"

    def fuse(self, job: peer.Job, folder: Path, output: Path, variant: str) -> None:
        del folder, variant
        config, merge = import_module("mergekit.config"), import_module("mergekit.merge")
        options = import_module("mergekit.options").MergeOptions(copy_tokenizer=False)
        weights = {job["base"]: 1 - job["alpha"], job["other"]: job["alpha"]}
        models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
        recipe = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
        merge.run_merge(config.MergeConfiguration.model_validate(recipe), str(output), options)


if __name__ == "__main__":
    peer.main(Mergekit)
