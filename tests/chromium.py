"""Pictures as Chromium decodes them: the reference for what everybody sees of a file."""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from ovserve.pixels.images import Pixels

__all__ = ["EXECUTABLE", "decode_in_chromium"]

EXECUTABLE = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""

# Straight alpha: a 2D canvas holds premultiplied pixels, which loses colour at low alpha. WebGL does not.
_PAGE = """<!doctype html><meta charset="utf-8"><script>
const files = %s;
async function decode(data) {
  const blob = await (await fetch(data)).blob();
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  await image.decode();
  const width = image.naturalWidth, height = image.naturalHeight;
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const gl = canvas.getContext("webgl", {premultipliedAlpha: false});
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, image);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const pixels = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
  let text = "";
  for (const value of pixels) text += String.fromCharCode(value);
  gl.getExtension("WEBGL_lose_context").loseContext();
  return [width, height, btoa(text)];
}
(async () => {
  const found = {};
  for (const [name, data] of Object.entries(files)) {
    try { found[name] = await decode(data); } catch (error) { found[name] = String(error); }
  }
  await fetch("/", {method: "POST", body: JSON.stringify(found)});
})();
</script>
"""


def decode_in_chromium(files: dict[str, bytes], folder: Path, timeout_s: float = 60) -> dict[str, Pixels | str]:
    """Return uint8 (H, W, 4) for each file, upright and in sRGB, or Chromium's error.

    Raises:
        queue.Empty: no result within `timeout_s`.
    """
    # The type of the data does not matter: Chromium looks at the first bytes.
    encoded = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in files.items()}
    page = (_PAGE % json.dumps(encoded)).encode()
    results: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(page)

        def do_POST(self) -> None:
            results.put(self.rfile.read(int(self.headers["content-length"])))
            self._reply(b"")

        def _reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        EXECUTABLE,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        "--disable-gpu",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--force-color-profile=srgb",
        f"--user-data-dir={folder / 'profile'}",
        f"http://127.0.0.1:{server.server_address[1]}/",
    ]
    browser = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        document = json.loads(results.get(timeout=timeout_s))
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait()
        server.shutdown()
        server.server_close()
    found: dict[str, Pixels | str] = {}
    for name, value in document.items():
        if isinstance(value, str):
            found[name] = value
        else:
            width, height, pixels = value
            found[name] = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 4)
    return found
