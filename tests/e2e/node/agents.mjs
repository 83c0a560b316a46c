// Use the image functions of agent libraries as programs do; each line of output is one call.
// Usage: node agents.mjs BASE_URL, with `ai`, `@ai-sdk/openai` and `@langchain/openai` installed beside it; see scripts/try-clients.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createOpenAI } from "@ai-sdk/openai";
import { DallEAPIWrapper } from "@langchain/openai";
import { generateImage } from "ai";

const url = process.argv[2];
const prompt = "A vibrant illustration of a red star centered on a blue background, with crisp edges and soft lighting.";
const version = (name) => createRequire(import.meta.url)(`./node_modules/${name}/package.json`).version;

const provider = createOpenAI({ baseURL: url, apiKey: "none" });
const drawn = await generateImage({ model: provider.image("gpt-image-1"), prompt, size: "256x256" });
console.log(`ai ${version("ai")} generateImage: ${drawn.image.mediaType} ${drawn.image.uint8Array.length} bytes`);

const source = readFileSync("tests/data/red_circle.png");
const edited = await generateImage({ model: provider.image("gpt-image-1"), prompt: { text: prompt, images: [source] } });
console.log(`ai ${version("ai")} generateImage with an image: ${edited.image.mediaType} ${edited.image.uint8Array.length} bytes`);

const tool = new DallEAPIWrapper({ n: 1, model: "dall-e-3", apiKey: "none", baseUrl: url, size: "256x256" });
console.log(`@langchain/openai ${version("@langchain/openai")} DallEAPIWrapper: ${await tool.invoke(prompt)}`);
