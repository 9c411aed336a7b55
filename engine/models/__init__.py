"""Networks, each written once for the command line, training and ComfyUI."""
