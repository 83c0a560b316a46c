// Requests to the server: models, readiness, and edits as a stream of progress, previews and pictures.

export class ApiError extends Error {
  // status: the HTTP status, 0 for a stream or network error. param: the field at fault, or null. code: from the reference page.
  constructor(status, error) {
    super(error.message || "The server gave no reason.");
    this.status = status;
    this.param = error.param || null;
    this.code = error.code || null;
  }
}

const authorization = key => (key ? {authorization: "Bearer " + key} : {});

async function failure(reply) {
  let error = {message: `The server answered ${reply.status} ${reply.statusText}.`};
  try { error = (await reply.json()).error || error; } catch { /* not JSON: a proxy's page, say */ }
  return new ApiError(reply.status, error);
}

export async function listModels(key) {
  const reply = await fetch("/v1/models", {headers: authorization(key)});
  if (!reply.ok) throw await failure(reply);
  return (await reply.json()).data;
}

export async function readiness() {
  const reply = await fetch("/v2/health/ready");
  return reply.json();
}

// Yield the blocks of a server-sent event stream: {event, data, comments}. Lines end in LF, CR or CRLF (HTML, section 9.2.6).
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  const parts = [];  // of the block that is not complete: joined once, as pictures are long
  let tail = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return;
      parts.push(value);
      // The end of a block may lie across two chunks.
      const seam = tail + value;
      tail = seam.slice(-3);
      if (!/\r\n\r\n|\n\n|\r\r/.test(seam)) continue;
      const blocks = parts.join("").split(/\r\n\r\n|\n\n|\r\r/);
      parts.length = 0;
      parts.push(blocks.pop());
      for (const block of blocks) yield parseBlock(block);
    }
  } finally { reader.cancel().catch(() => {}); }
}

function parseBlock(block) {
  const found = {event: "message", data: "", comments: []};
  const data = [];
  for (const line of block.split(/\r\n|\n|\r/)) {
    if (line.startsWith(":")) found.comments.push(line.slice(1).trim());
    else if (line.startsWith("event:")) found.event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  found.data = data.join("\n");
  return found;
}

export function blobOf(base64, type) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k += 1) bytes[k] = text.charCodeAt(k);
  return new Blob([bytes], {type});
}

// What a comment line of the stream says about the job.
export function parseProgress(comment) {
  const step = /^picture (\d+): step (\d+)\/(\d+)$/.exec(comment);
  if (step) return {kind: "step", picture: Number(step[1]), step: Number(step[2]), steps: Number(step[3])};
  const queue = /^queue: (\d+) ahead(?:, about (\d+) s)?$/.exec(comment);
  if (queue) return {kind: "queue", ahead: Number(queue[1]), seconds: queue[2] === undefined ? null : Number(queue[2])};
  const load = /^model .* is ([a-z]+)[^:]*:(?: (\d+) %,)?/.exec(comment);
  if (load) return {kind: "load", state: load[1], percent: load[2] === undefined ? null : Number(load[2])};
  return {kind: comment};
}

// Send an edit (with pictures) or a generation; resolve to the finished pictures.
// listeners: progress(report of parseProgress), preview(blob, seed), picture(blob, seed).
export async function submit({fields, files, key, signal, listeners}) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  body.append("stream", "true");
  body.append("response_format", "b64_json");
  for (const [name, blob, filename] of files) body.append(name, blob, filename);
  const endpoint = files.length ? "edits" : "generations";
  const reply = await fetch("/v1/images/" + endpoint, {method: "POST", body, headers: authorization(key), signal});
  if (!reply.ok) throw await failure(reply);
  const pictures = [];
  for await (const {event, data, comments} of readEvents(reply.body)) {
    for (const comment of comments) listeners.progress(parseProgress(comment));
    if (!data) continue;
    const message = JSON.parse(data);
    if (event === "error" || message.error) throw new ApiError(0, message.error || message);
    const blob = blobOf(message.b64_json, "image/" + message.output_format);
    if (event.endsWith(".partial_image")) listeners.preview(blob, message.seed);
    if (event.endsWith(".completed")) {
      pictures.push({blob, ...message, b64_json: undefined});
      listeners.picture(blob, message.seed);
    }
  }
  if (!pictures.length) throw new ApiError(0, {message: "The connection ended before a picture came."});
  return pictures.sort((one, other) => one.picture_index - other.picture_index); // each comes when it is finished
}
