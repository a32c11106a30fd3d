"""LoRA files of every layout: names, metadata and algebra of their tensors, reading, writing."""

from cntlora_core.lora_file.writing import collect_adapter, read_lora_file, write_lora_file

__all__ = ["collect_adapter", "read_lora_file", "write_lora_file"]
