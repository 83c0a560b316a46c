"""ovserve: an image-edit server that speaks OpenAI's images API over OpenVINO GenAI.

This module imports nothing: every worker process pays for what stands here.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
