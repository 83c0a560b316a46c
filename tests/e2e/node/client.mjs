// What a user of the official Node client does, told as one JSON document on standard output.
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
const told = {};

const edited = await client.images.edit({ image: image(), prompt, seed: 5 });
told.edit = edited.data[0].b64_json;
told.seed = edited.data[0].seed;

const listed = await client.images.edit({ image: [await buffered("red_circle.png")], prompt, seed: 5 });
told.list = listed.data[0].b64_json;

const masked = await client.images.edit({
  image: await buffered("red_circle.png"), mask: await buffered("mask_alpha.png"), prompt: "a white cross on a blue background", seed: 5,
});
told.masked = masked.data[0].b64_json;

// Version 4 sends `stream` and has no reader for these events.
told.events = [];
if (name === "openai") for await (const event of await client.images.edit({ image: image(), prompt, seed: 5, stream: true, partial_images: 2 })) {
  told.events.push({ type: event.type, index: event.partial_image_index ?? null, b64_json: event.b64_json, usage: event.usage ?? null });
}

told.generated = (await client.images.generate({ prompt: "a red star", n: 2 })).data.length;
told.models = [];
for await (const model of client.models.list()) told.models.push(model.id);
told.model = (await client.models.retrieve(told.models[0])).id;

const failure = async (promise) => {
  try {
    await promise;
    return null;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, param: error.param, code: error.code, id: Boolean(error.requestID ?? error.request_id) };
  }
};
told.bad = await failure(client.images.edit({ image: image(), prompt, n: 99 }));
told.missing = await failure(client.images.generate({ prompt, model: "ghost" }));
console.log(JSON.stringify(told));
