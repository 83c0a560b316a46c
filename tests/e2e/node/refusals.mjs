// Send uploads that are refused early, and count how often the client reads the answer; as refusals.py does.
// Usage: node refusals.mjs PACKAGES_FOLDER CLIENT URL KEY BYTES COUNT STATUS, with CLIENT fetch or openai.
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, name, url, key, size, count, status] = process.argv.slice(2);
const file = () => new File([new Uint8Array(Number(size))], "a.png", { type: "image/png" });

const withFetch = async () => {
  const form = new FormData();
  form.append("image", file());
  form.append("prompt", "a red circle");
  const reply = await fetch(url, { method: "POST", body: form, headers: { Authorization: `Bearer ${key}` } });
  await reply.text();
  return reply.status;
};

const withOpenai = () => {
  const { OpenAI } = createRequire(join(folder, "package.json"))("openai");
  const client = new OpenAI({ baseURL: url.replace("/images/edits", ""), apiKey: key, maxRetries: 0 });
  return async () => {
    try {
      await client.images.edit({ image: file(), prompt: "a red circle" });
      return 200;
    } catch (error) {
      if (error.status === undefined) throw error;
      return error.status;
    }
  };
};

const upload = name === "fetch" ? withFetch : withOpenai();
let answered = 0;
const lost = {};
const note = (what) => { lost[what] = (lost[what] ?? 0) + 1; };
for (let number = 0; number < Number(count); number++) {
  try {
    const found = await upload();
    if (found === Number(status)) answered++;
    else note(`status ${found}`);
  } catch (error) {
    note(`${error.name}: ${error.message} ${error.cause?.code ?? error.cause?.message ?? ""}`.slice(0, 200));
  }
}
console.log(JSON.stringify({ answered, lost }));
