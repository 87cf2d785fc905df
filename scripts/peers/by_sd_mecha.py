"""sd-mecha: a recipe that adds each converted LoRA to the base, or of two models, in float32 and stored in fp16."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import peer


class SdMecha(peer.Peer):
    """Version 1.0.14 does SD1.5; 1.1.8 fails on its LoRAs, and does SDXL if its method is called past its wrapper."""

    packages = ("sd-mecha", "torch")
    imports = ("sd_mecha",)
    merges = True

    def refusal(self, job: peer.Job) -> str | None:
        if job["model"] not in ("sd15", "sdxl"):
            return f"has no configuration for {job['model']}"
        if not peer.kinds(job) <= {"lora", "lokr"}:
            return f"leaves {', '.join(sorted(peer.kinds(job)))} out without failing"
        return None

    def fuse(self, job: peer.Job, folder: Path, output: Path, variant: str) -> None:
        del folder, variant
        torch, mecha = import_module("torch"), import_module("sd_mecha")
        methods = import_module("sd_mecha.extensions.builtin.merge_methods")
        is_new = hasattr(methods, "linear")
        add = methods.linear.add_difference if is_new else mecha.add_difference
        base = mecha.model(job["base"])
        recipe = mecha.weighted_sum(base, mecha.model(job["other"]), alpha=job["alpha"]) if "other" in job else base
        for adapter in job["adapters"]:
            recipe = add(recipe, mecha.convert(mecha.model(adapter["path"]), base), alpha=adapter["weight"])
            recipe = recipe | base if is_new else recipe
        options = {"merge_device": "cpu", "merge_dtype": torch.float32, "output_dtype": torch.float16}
        mecha.merge(recipe, fallback_model=base, output=str(output), **options)


if __name__ == "__main__":
    peer.main(SdMecha)
