// Run the image operations of n8n's OpenAI node, from its package, without n8n: this file stands for the program around the node.
// Usage: node n8n.mjs BASE_URL, with @n8n/n8n-nodes-langchain unpacked in `n8n/package` beside it, and n8n-workflow and form-data
// installed there; see scripts/try-clients. Each line of output is one call.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const url = process.argv[2];
const require = createRequire(import.meta.url);
const root = "./n8n/package";
const { version } = require(`${root}/package.json`);
const operation = (name) => require(`${root}/dist/nodes/vendors/OpenAi/v2/actions/image/${name}.operation.js`);
const PROMPT = "a green circle on a blue background";
const files = { data: "red_circle.png", mask: "mask_alpha.png" };
const read = (name) => readFileSync(`tests/data/${files[name]}`);

// What a node calls: its parameters, its credentials, and requests in the form of n8n's `requestWithAuthentication`.
const host = (parameters, typeVersion) => ({
  getNode: () => ({ name: "OpenAI", type: "openAi", typeVersion, parameters: {} }),
  getNodeParameter: (name, _item, fallback) => parameters[name] ?? fallback,
  getCredentials: async () => ({ url, apiKey: "none" }),
  helpers: {
    assertBinaryData: (_item, name) => ({ fileName: files[name], mimeType: "image/png" }),
    getBinaryDataBuffer: async (_item, name) => read(name),
    binaryToBuffer: async (content) => content,
    prepareBinaryData: async (content) => ({ mimeType: "image/png", bytes: content.length, start: content.toString("latin1", 1, 4) }),
    async requestWithAuthentication(_name, { uri, method, headers, body, formData }) {
      const sent = formData ? formData.getBuffer() : JSON.stringify(body);
      const type = formData ? {} : { "content-type": "application/json" };
      const reply = await fetch(uri, { method, headers: { authorization: "Bearer none", ...type, ...headers }, body: sent });
      const document = await reply.json();
      if (!reply.ok) throw new Error(`${reply.status} ${document.error.message}`);
      return document;
    },
  },
});

const image = { values: [{ binaryPropertyName: "data" }] };
const calls = [
  ["generate", 2, { model: "dall-e-3", prompt: PROMPT, options: { size: "1024x1024", dalleQuality: "standard" } }],
  ["generate", 2, { model: "dall-e-3", prompt: PROMPT, options: { returnImageUrls: true } }],
  ["generate", 2.3, { modelId: "gpt-image-1-mini", prompt: PROMPT, options: { quality: "low", size: "1024x1024" } }],
  ["edit", 2, { model: "gpt-image-1", prompt: PROMPT, images: image, size: "1024x1024" }],
  ["edit", 2.3, { modelId: "gpt-image-1.5", prompt: PROMPT, images: image, size: "auto", options: { imageMask: "mask", inputFidelity: "high", background: "auto", outputFormat: "png" } }],
  ["edit", 2, { model: "dall-e-2", prompt: PROMPT, binaryPropertyName: "data", size: "256x256", options: { imageMask: "mask", user: "me" } }],
];
for (const [name, typeVersion, parameters] of calls) {
  const { model, modelId } = parameters;
  const [item] = await operation(name).execute.call(host(structuredClone(parameters), typeVersion), 0);
  const found = item.json.url ? (await (await fetch(item.json.url)).arrayBuffer()).byteLength : item.json.bytes;
  console.log(`n8n ${version} ${name} ${model ?? modelId}: ${item.json.url ? "URL" : item.json.start} ${found} bytes`);
}
