// Settings from a picture's metadata: the PNG text chunk "parameters", as this server and common image tools write it.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MAX_TEXT_BYTES = 1024 * 1024;
const FIELDS = {
  "Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size",
  "Denoising strength": "strength", "Quality": "quality", "Model": "model",
};

// Return the settings by field name, or null if the file has none.
export async function readSettings(file) {
  const text = await readParameters(file);
  return text === null ? null : parseParameters(text);
}

async function readParameters(file) {
  const head = new Uint8Array(await file.slice(0, 8).arrayBuffer());
  if (SIGNATURE.some((byte, k) => head[k] !== byte)) return null;
  for (let offset = 8; offset + 12 <= file.size;) {
    const view = new DataView(await file.slice(offset, offset + 8).arrayBuffer());
    const length = view.getUint32(0), kind = String.fromCharCode(...new Uint8Array(view.buffer, 4, 4));
    if ((kind === "tEXt" || kind === "iTXt") && length <= MAX_TEXT_BYTES) {
      const chunk = new Uint8Array(await file.slice(offset + 8, offset + 8 + length).arrayBuffer());
      const text = await textOf(kind, chunk);
      if (text !== null) return text;
    }
    offset += 12 + length;
  }
  return null;
}

// PNG (W3C), sections 11.3.3.2 and 11.3.3.4.
async function textOf(kind, chunk) {
  const end = chunk.indexOf(0);
  if (end < 0 || new TextDecoder("latin1").decode(chunk.subarray(0, end)) !== "parameters") return null;
  if (kind === "tEXt") return new TextDecoder("latin1").decode(chunk.subarray(end + 1));
  const isCompressed = chunk[end + 1] === 1, language = chunk.indexOf(0, end + 3), start = chunk.indexOf(0, language + 1) + 1;
  if (language < 0 || start === 0) return null;
  const data = chunk.subarray(start);
  if (!isCompressed) return new TextDecoder().decode(data);
  try {
    const inflated = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
    const parts = [];
    for (let size = 0; size <= MAX_TEXT_BYTES;) {
      const {value, done} = await inflated.read();
      if (done) return new TextDecoder().decode(new Uint8Array(await new Blob(parts).arrayBuffer()));
      parts.push(value);
      size += value.length;
    }
  } catch { /* damaged */ }
  return null;
}

export function parseParameters(text) {
  const lines = text.split(/\r?\n/), settings = {};
  const last = lines.length > 0 && /^Steps: /.test(lines[lines.length - 1]) ? lines.pop() : "";
  const negative = lines.findIndex(line => line.startsWith("Negative prompt: "));
  if (negative >= 0) settings.negative_prompt = plain(lines.splice(negative).join("\n").slice("Negative prompt: ".length));
  settings.prompt = plain(lines.join("\n"));
  for (const pair of last.split(", ")) {
    const [, key, value] = /^([^:]+): (.*)$/.exec(pair) || [];
    if (key in FIELDS) settings[FIELDS[key]] = value;
  }
  return settings;
}

// The server writes a prompt that could be misread as a JSON string.
function plain(line) {
  if (!line.startsWith('"')) return line;
  try { return String(JSON.parse(line)); } catch { return line; }
}
