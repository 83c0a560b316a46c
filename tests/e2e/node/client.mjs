// Use the official Node client as an application does; write the results to standard output as one JSON document.
// Usage: node client.mjs PACKAGES_FOLDER PACKAGE SERVER_URL SAMPLES_FOLDER
import { createReadStream, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, name, url, samples] = process.argv.slice(2);
const require = createRequire(join(folder, "package.json"));
const { OpenAI, toFile } = require(name);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const prompt = "a green circle on a blue background";
const image = () => createReadStream(join(samples, "red_circle.png"));
const buffered = async (file) => toFile(readFileSync(join(samples, file)), file, { type: "image/png" });
const output = {};

const edited = await client.images.edit({ image: image(), prompt, seed: 5 });
output.edit = edited.data[0].b64_json;
output.seed = edited.data[0].seed;

const listed = await client.images.edit({ image: [await buffered("red_circle.png")], prompt, seed: 5 });
output.list = listed.data[0].b64_json;

const masked = await client.images.edit({
  image: await buffered("red_circle.png"), mask: await buffered("mask_alpha.png"), prompt: "a white cross on a blue background", seed: 5,
});
output.masked = masked.data[0].b64_json;

// Version 4 sends `stream`, but cannot read these events.
output.events = [];
if (name === "openai") for await (const event of await client.images.edit({ image: image(), prompt, seed: 5, stream: true, partial_images: 2 })) {
  output.events.push({ type: event.type, index: event.partial_image_index ?? null, b64_json: event.b64_json, usage: event.usage ?? null });
}

output.generated = (await client.images.generate({ prompt: "a red star", n: 2 })).data.length;
output.models = [];
for await (const model of client.models.list()) output.models.push(model.id);
output.model = (await client.models.retrieve(output.models[0])).id;

const failure = async (promise) => {
  try {
    await promise;
    return null;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, param: error.param, code: error.code, id: Boolean(error.requestID ?? error.request_id) };
  }
};
output.bad = await failure(client.images.edit({ image: image(), prompt, n: 99 }));
output.missing = await failure(client.images.generate({ prompt, model: "ghost" }));
console.log(JSON.stringify(output));
