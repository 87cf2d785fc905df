"""diffusers: load_lora_weights, fuse_lora and save_pretrained on the diffusers folder of the same model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import peer
import pipelines


class Diffusers(peer.Peer):
    """The documented way to keep a fused pipeline. fp32 is exact enough and takes twice the memory."""

    packages = ("diffusers", "peft", "transformers", "torch")
    imports = ("diffusers", "peft", "transformers")
    variants = ("fp16", "fp32")

    def refusal(self, job: peer.Job) -> str | None:
        if job["model"] not in pipelines.MODELS:
            return f"no configuration for {job['model']} in scripts/peers/pipelines.py"
        if peer.kinds(job) != {"lora"}:
            return f"loads LoRA only, not {', '.join(sorted(peer.kinds(job)))}"
        return None

    def prepare(self, job: peer.Job, folder: Path) -> Path:
        return pipelines.write_folder(job["model"], job["base"], folder)

    def fuse(self, job: peer.Job, folder: Path, output: Path, variant: str) -> None:
        torch = import_module("torch")
        dtype = {"fp16": "float16", "fp32": "float32"}[variant]
        pipeline = pipelines.load_folder(job["model"], folder / "base", dtype)
        weights = {f"adapter{number}": adapter for number, adapter in enumerate(job["adapters"])}
        for name, adapter in weights.items():
            pipeline.load_lora_weights(adapter["path"], adapter_name=name)
        pipeline.set_adapters(list(weights), [adapter["weight"] for adapter in weights.values()])
        pipeline.fuse_lora(adapter_names=list(weights))
        pipeline.unload_lora_weights()
        pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)


if __name__ == "__main__":
    peer.main(Diffusers)
