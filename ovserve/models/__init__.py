"""What a model is: profile, catalog, presets, step rules. No sockets, no arrays, no openvino."""
