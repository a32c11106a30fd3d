"""CNTLoRA's nodes for ComfyUI: each converts its inputs, calls the core once, and converts back."""
