"""LoRA adapters from files: tensors, the names of the modules that they change, and alphas. No openvino."""
