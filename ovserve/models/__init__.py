"""Model descriptions: profile, catalog, presets, step rules. No sockets, no arrays, no openvino."""
