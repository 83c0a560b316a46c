// The same request as code: curl, Python and Node, which run as pasted in a folder with the picture.

const OPENAI_FIELDS = new Set(["model", "prompt", "n", "size", "quality", "background", "output_format", "output_compression"]);
const NUMBERS = new Set(["n", "output_compression", "seed", "strength", "num_inference_steps", "guidance_scale", "mask_blur"]);

// request: {fields, images: [file names], mask: file name or "", origin, hasKey, extension}.
export function snippet(language, request) {
  return {curl, python, node}[language](request);
}

const shell = text => "'" + String(text).replaceAll("'", "'\\''") + "'";
// JSON strings are valid in Python and JavaScript.
const quoted = text => JSON.stringify(String(text)).replace(/[\u007f-\u009f\u2028\u2029]/g, c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
const literal = (name, value) => (NUMBERS.has(name) ? String(Number(value)) : quoted(value));
// curl's own quoting of file names in -F.
const formFile = name => '"' + name.replace(/["\\]/g, c => "\\" + c) + '"';

function curl({fields, images, mask, origin, hasKey, extension}) {
  const endpoint = images.length ? "edits" : "generations", field = images.length > 1 ? "image[]" : "image";
  const lines = [`curl -sS ${origin}/v1/images/${endpoint}`];
  if (hasKey) lines.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  for (const [name, value] of Object.entries(fields)) lines.push("--form-string " + shell(`${name}=${value}`));
  for (const name of images) lines.push("-F " + shell(`${field}=@${formFile(name)}`));
  if (mask) lines.push("-F " + shell(`mask=@${formFile(mask)}`));
  return lines.join(" \\\n  ") + ` \\\n  | jq -r '.data[0].b64_json' | base64 -d > result.${extension}\n`;
}

function split(fields) {
  const own = [], others = [];
  for (const [name, value] of Object.entries(fields)) (OPENAI_FIELDS.has(name) ? own : others).push([name, literal(name, value)]);
  return [own, others];
}

function python({fields, images, mask, origin, hasKey, extension}) {
  const [own, others] = split(fields), key = hasKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  const files = images.map(name => `open(${quoted(name)}, "rb")`);
  const lines = ["import base64"];
  if (hasKey) lines.push("import os");
  lines.push("", "from openai import OpenAI", "", `client = OpenAI(base_url=${quoted(origin + "/v1")}, api_key=${key})`);
  lines.push(`reply = client.images.${images.length ? "edit" : "generate"}(`);
  if (files.length) lines.push(`    image=${files.length > 1 ? "[" + files.join(", ") + "]" : files[0]},`);
  if (mask) lines.push(`    mask=open(${quoted(mask)}, "rb"),`);
  for (const [name, value] of own) lines.push(`    ${name}=${value},`);
  if (others.length) lines.push(`    extra_body={${others.map(([name, value]) => `"${name}": ${value}`).join(", ")}},`);
  lines.push(")", "for number, picture in enumerate(reply.data):");
  lines.push(`    with open(f"result-{number}.${extension}", "wb") as file:`, "        file.write(base64.b64decode(picture.b64_json))", "");
  return lines.join("\n");
}

function node({fields, images, mask, origin, hasKey, extension}) {
  const key = hasKey ? "process.env.OPENAI_API_KEY" : '"none"';
  const files = images.map(name => `fs.createReadStream(${quoted(name)})`);
  const lines = ['import fs from "node:fs";', 'import OpenAI from "openai";', ""];
  lines.push(`const client = new OpenAI({baseURL: ${quoted(origin + "/v1")}, apiKey: ${key}});`);
  lines.push(`const reply = await client.images.${images.length ? "edit" : "generate"}({`);
  if (files.length) lines.push(`  image: ${files.length > 1 ? "[" + files.join(", ") + "]" : files[0]},`);
  if (mask) lines.push(`  mask: fs.createReadStream(${quoted(mask)}),`);
  for (const [name, value] of Object.entries(fields)) lines.push(`  ${name}: ${literal(name, value)},`);
  lines.push("});", "reply.data.forEach((picture, number) => {");
  lines.push(`  fs.writeFileSync(\`result-\${number}.${extension}\`, Buffer.from(picture.b64_json, "base64"));`, "});", "");
  return lines.join("\n");
}
