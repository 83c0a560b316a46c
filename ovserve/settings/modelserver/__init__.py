"""The configuration files of OpenVINO Model Server, read as settings: graph.pbtxt, config.json, and graphs written."""
