// The page at "/": connects the editor, the settings, the results and the server.

import {ApiError, listModels, readiness, submit} from "./api.js";
import {Editor} from "./editor.js";
import {readSettings} from "./pnginfo.js";
import {Results} from "./results.js";
import {Settings, featuresOf} from "./settings.js";
import {snippet} from "./snippets.js";

const MODELS_EVERY_MS = 5000;
const KEY = "ovserve.key";
const PREVIEWS = "3";

const at = id => document.getElementById(id);
const editor = new Editor(at("canvas"));
const settings = new Settings(at("form"));
const results = new Results();
const run = {abort: null, startedAt: 0, step: 0, steps: 0, pictures: 1};
let references = [];  // further pictures, for models that take several
let isLocked = false, lastSeed = null, language = "";

// --- errors and announcements ---------------------------------------------------------------------------------------------

function showError(error) {
  const message = error instanceof TypeError ? "The server cannot be reached." : error.message || String(error);
  if (error.param && settings.showError(error.param, message)) return;
  at("error").textContent = message;
  at("error").hidden = false;
  if (error.status === 401) at("key-dialog").showModal();
}

function clearErrors() {
  at("error").hidden = true;
  settings.clearErrors();
}

const announce = text => { at("announce").textContent = text; };

// --- models and the state of the server --------------------------------------------------------------------------------------

const key = () => { try { return sessionStorage.getItem(KEY) || ""; } catch { return at("key").value; } };

function showServer(text, isBad) {
  at("server").textContent = text;
  at("server").classList.toggle("bad", isBad);
}

async function refresh() {
  try {
    settings.setModels(await listModels(key()));
    showModelState(settings.model);
    await showSamples();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return showServer("API key required", true);
    if (error instanceof ApiError) return showServer(error.message, true);
    const state = await readiness().catch(() => null);
    showServer(state ? "Not ready" : "No connection to the server", true);
  }
}

function showModelState(model) {
  if (!model) return showServer("No model", true);
  const waiting = model.queued ? `, ${model.queued} waiting` : "", running = model.running ? `, ${model.running} running` : "";
  showServer(model.ready ? `Ready${running}${waiting}` : model.reason || "Not ready", !model.ready);
}

async function refreshForever() {
  for (;;) {
    if (document.visibilityState === "visible") await refresh();
    await new Promise(resolve => { setTimeout(resolve, MODELS_EVERY_MS); });
  }
}

// --- pictures in ------------------------------------------------------------------------------------------------------------------

async function load(files) {
  const [first, ...others] = files;
  if (!first) return;
  clearErrors();
  try {
    const picture = await createImageBitmap(first);
    results.hide();
    references = others;
    at("drop").hidden = true;
    at("editor").hidden = false;
    editor.load(picture, first);
    settings.setHasPicture(true);
  } catch { return showError(new Error(`This browser cannot show ${first.name}. Use PNG, JPEG, WebP or AVIF.`)); }
  showReferences();
  offerSettings(first);
}

async function offerSettings(file) {
  const found = await readSettings(file);
  at("found-settings").hidden = found === null;
  at("found-apply").onclick = () => { settings.apply(found); at("found-settings").hidden = true; };
}

function showReferences() {
  const taken = settings.model ? featuresOf(settings.model).references : 0;
  const sent = references.slice(0, Math.max(0, taken - 1)), left = references.slice(sent.length);
  const names = files => files.map(file => file.name).join(", ");
  const lines = [];
  if (sent.length) lines.push(`Sent as references too: ${names(sent)}.`);
  if (left.length) lines.push(`Not sent, because this model takes ${taken > 1 ? `${taken} pictures` : "one picture"}: ${names(left)}.`);
  at("references").hidden = references.length === 0;
  at("references").textContent = lines.join(" ");
}

function unload() {
  editor.unload();
  references = [];
  at("editor").hidden = at("found-settings").hidden = true;
  at("drop").hidden = false;
  settings.setHasPicture(false);
}

async function loadMask(blob) {
  try { editor.loadMask(await createImageBitmap(blob)); } catch { showError(new Error("This browser cannot show the mask.")); }
}

function picturesOf(transfer) {
  return [...transfer.files].filter(file => file.type.startsWith("image/") || !file.type);
}

// --- samples --------------------------------------------------------------------------------------------------------------------------

async function showSamples() {
  const list = at("sample-list"), model = settings.model;
  at("samples").hidden = !model?.builtin;
  if (!model?.builtin || list.childElementCount) return;
  const samples = (await (await fetch("/web/samples.json")).json())[model.builtin] || [];
  list.replaceChildren(...samples.map(sample => {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = sample.result;
    image.alt = "";
    button.type = "button";
    button.className = "sample";
    button.append(image, sample.label);
    button.addEventListener("click", () => runSample(sample));
    return button;
  }));
}

async function runSample(sample) {
  settings.apply(sample.settings);
  if (sample.image) {
    const blob = await (await fetch(sample.image)).blob();
    await load([new File([blob], "sample.png", {type: blob.type})]);
    for (const stroke of sample.strokes || []) editor.edit({kind: "stroke", hardness: 0.9, erase: false, ...stroke});
  }
  await send();
}

// --- send ---------------------------------------------------------------------------------------------------------------------------

// Return the files of the request: [field, blob, name], and what the code snippet needs.
async function filesToSend(fields) {
  if (!editor.picture) return [];
  const {image, name, mask} = await editor.input();
  const takes = featuresOf(settings.model).references;
  const images = [[image, name], ...(takes > 1 ? references.slice(0, takes - 1).map(file => [file, file.name]) : [])];
  const files = images.map(([blob, filename]) => [images.length > 1 ? "image[]" : "image", blob, filename]);
  if (mask) {
    files.push(["mask", mask, "mask.png"]);
    fields.mask_mode = "luminance";
  }
  return files;
}

async function send() {
  if (run.abort) return;
  clearErrors();
  const fields = settings.fields();
  if (isLocked && lastSeed !== null && !fields.seed) fields.seed = String(lastSeed);
  run.abort = new AbortController();
  Object.assign(run, {startedAt: performance.now(), step: 0, steps: 0, picture: 1, pictures: Number(fields.n || 1), denoisingAt: 0});
  showRunning(true);
  try {
    const files = await filesToSend(fields), input = files.length ? files[0][1] : null;
    const kept = {...settings.fields()};
    const listeners = {
      progress: showProgress,
      preview: blob => { if (run.pictures === 1) showPreview(blob); },
      picture: () => {},
    };
    const pictures = await submit({fields: {...fields, partial_images: PREVIEWS}, files, key: key(), signal: run.abort.signal, listeners});
    const seconds = (performance.now() - run.startedAt) / 1000;
    for (const picture of pictures.reverse()) await keep(picture, {...kept, seed: String(picture.seed)}, input, seconds);
    lastSeed = pictures[pictures.length - 1].seed;
    if (isLocked) settings.control("seed").value = lastSeed;
    results.show(results.results[0]);
    announce(`Done in ${seconds.toFixed(1)} seconds.`);
  } catch (error) {
    hidePreview();
    if (error.name === "AbortError") announce("Cancelled.");
    else showError(error);
  } finally {
    run.abort = null;
    showRunning(false);
    refresh();
  }
}

function keep(picture, used, input, seconds) {
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
  return results.add({
    id, createdAt: Date.now() + performance.now() % 1, blob: picture.blob, input, settings: used, seed: picture.seed, model: picture.model, size: picture.size,
    revised_prompt: picture.revised_prompt, seconds,
  });
}

function showRunning(isRunning) {
  at("progress").hidden = !isRunning;
  at("send").disabled = isRunning;
  if (!isRunning) return;
  at("bar").removeAttribute("value");
  at("progress-text").textContent = "Sending …";
}

function showProgress(report) {
  if (report.kind === "queue") {
    const wait = report.seconds === null ? "" : `, about ${report.seconds} s`;
    at("progress-text").textContent = report.ahead ? `Waiting: ${report.ahead} before this one${wait}` : "Next in the queue";
    return;
  }
  if (report.kind === "load") {
    at("progress-text").textContent = `The model is ${report.state}${report.percent === null ? " …" : `: ${report.percent} %`}`;
    return;
  }
  if (report.kind !== "step") {
    if (!run.steps) at("progress-text").textContent = "Waiting …";
    return;
  }
  if (!run.denoisingAt) run.denoisingAt = performance.now();
  const done = (report.picture - 1) * report.steps + report.step, all = run.pictures * report.steps;
  Object.assign(run, {step: report.step, steps: report.steps});
  at("bar").value = Math.min(done / all, 1);
  const elapsed = performance.now() - run.denoisingAt, left = done > 1 ? elapsed / (done - 1) * (all - done) / 1000 : null;
  const of = run.pictures > 1 ? `picture ${report.picture} of ${run.pictures}, ` : "";
  at("progress-text").textContent = `${of}step ${report.step} of ${report.steps}${left === null ? "" : `, ${left.toFixed(left < 10 ? 1 : 0)} s left`}`;
}

function showPreview(blob) {
  const before = at("after").src;
  at("after").src = URL.createObjectURL(blob);
  if (before.startsWith("blob:") && at("view").dataset.preview === "true") URL.revokeObjectURL(before);
  at("view").dataset.preview = "true";
  at("after").alt = "Preview";
  at("view").hidden = false;
  at("editor").hidden = at("drop").hidden = at("before").hidden = at("split").hidden = true;
}

function hidePreview() {
  at("view").dataset.preview = "false";
  if (!results.shown) backToEditor();
}

function backToEditor() {
  results.hide();
  at("view").hidden = true;
  at("view").dataset.preview = "false";
  at("editor").hidden = !editor.picture;
  at("drop").hidden = Boolean(editor.picture);
}

// --- code -------------------------------------------------------------------------------------------------------------------------------

async function showSnippet() {
  if (!language) return;
  const fields = settings.fields(), files = await filesToSend(fields);
  const mask = files.find(([field]) => field === "mask");
  const text = snippet(language, {
    fields, origin: location.origin, hasKey: Boolean(key()), extension: fields.output_format || "png",
    images: files.filter(([field]) => field !== "mask").map(([, , name]) => name), mask: mask ? "mask.png" : "",
  });
  at("snippet").textContent = text;
  at("snippet").hidden = false;
  const link = at("mask-download");
  if (link.href) URL.revokeObjectURL(link.href);
  link.hidden = !mask;
  if (mask) link.href = URL.createObjectURL(mask[1]);
  try { await navigator.clipboard.writeText(text); announce("Copied."); } catch { announce("The code is shown below; copy it from there."); }
}

// --- camera -----------------------------------------------------------------------------------------------------------------------------

async function openCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    at("camera-video").srcObject = stream;
    at("camera-take").disabled = true;  // before the first frame there is no picture to take
    at("camera-dialog").showModal();
    await at("camera-video").play();
    at("camera-take").disabled = false;
  } catch (error) { showError(new Error(`The camera cannot be used: ${error.message}`)); }
}

function closeCamera() {
  for (const track of at("camera-video").srcObject?.getTracks() ?? []) track.stop();
  at("camera-video").srcObject = null;
  at("camera-dialog").close();
}

function takePicture() {
  const video = at("camera-video"), canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(blob => { closeCamera(); load([new File([blob], "camera.png", {type: "image/png"})]); }, "image/png");
}

// --- wiring -----------------------------------------------------------------------------------------------------------------------------

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("ovserve.theme", theme); } catch { /* storage is off */ }
}

function startTheme() {
  let theme = null;
  try { theme = localStorage.getItem("ovserve.theme"); } catch { /* storage is off */ }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = theme || (dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => { if (!theme) document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; });
  at("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
}

function wireEditor() {
  for (const button of document.querySelectorAll("[data-tool]")) button.addEventListener("click", () => { editor.setTool(button.dataset.tool); editor.canvas.focus(); });
  editor.addEventListener("tool", () => {
    for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-checked", String(button.dataset.tool === editor.tool));
    at("margins").hidden = editor.tool !== "frame" && !editor.hasMargins;
    at("brush-size").value = editor.size;
    if (editor.picture && editor.tool === "frame") editor.fit();
  });
  editor.addEventListener("change", () => {
    at("undo").disabled = !editor.mask.operations.length;
    at("redo").disabled = !editor.mask.undone.length;
    at("send").textContent = editor.picture ? "Edit" : "Generate";
    for (const name of ["left", "top", "right", "bottom"]) at(`margin-${name}`).value = editor.margins[name];
  });
  at("brush-size").addEventListener("input", event => { editor.size = Number(event.target.value); editor.render(); });
  at("brush-hardness").addEventListener("input", event => { editor.hardness = Number(event.target.value) / 100; });
  const actions = {
    "undo": () => editor.undo(), "redo": () => editor.redo(), "zoom-in": () => editor.zoom(1.25), "zoom-out": () => editor.zoom(0.8),
    "zoom-fit": () => editor.fit(), "mask-clear": () => editor.edit({kind: "clear"}), "mask-fill": () => editor.edit({kind: "fill"}),
    "mask-invert": () => editor.edit({kind: "invert"}), "mask-upload": () => at("mask-file").click(), "remove": unload,
    "margin-reset": () => { editor.setMargins({left: 0, top: 0, right: 0, bottom: 0}); editor.fit(); },
  };
  for (const [id, action] of Object.entries(actions)) at(id).addEventListener("click", action);
  for (const name of ["left", "top", "right", "bottom"]) {
    at(`margin-${name}`).addEventListener("change", event => { editor.setMargins({[name]: event.target.value}); editor.fit(); });
  }
  at("mask-file").addEventListener("change", event => { if (event.target.files[0]) loadMask(event.target.files[0]); event.target.value = ""; });
}

function wirePictures() {
  at("choose").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", event => { load([...event.target.files]); event.target.value = ""; });
  for (const kind of ["dragenter", "dragover"]) {
    addEventListener(kind, event => { if (event.dataTransfer?.types.includes("Files")) { event.preventDefault(); document.body.classList.add("dragging"); } });
  }
  addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  addEventListener("drop", event => {
    document.body.classList.remove("dragging");
    if (!event.dataTransfer?.files.length) return;
    event.preventDefault();
    load(picturesOf(event.dataTransfer));
  });
  addEventListener("paste", event => { const files = picturesOf(event.clipboardData); if (files.length) { event.preventDefault(); load(files); } });
  at("camera-open").hidden = !(isSecureContext && navigator.mediaDevices?.getUserMedia);
  at("camera-open").addEventListener("click", openCamera);
  at("camera-take").addEventListener("click", takePicture);
  at("camera-close").addEventListener("click", closeCamera);
  at("camera-dialog").addEventListener("cancel", closeCamera);
}

function wireResults() {
  results.addEventListener("show", () => { at("view").dataset.preview = "false"; at("editor").hidden = at("drop").hidden = true; });
  results.addEventListener("hide", backToEditor);
  results.addEventListener("unkept", event => showError(new Error(`This browser cannot keep the result: ${event.detail?.message}`)));
  at("view-back").addEventListener("click", backToEditor);
  at("use-input").addEventListener("click", () => {
    const {blob, seed} = results.shown;
    load([new File([blob], `ovserve-${seed}.${blob.type.split("/")[1]}`, {type: blob.type})]);
  });
  at("use-mask").addEventListener("click", async () => {
    const {blob} = results.shown;
    if (!editor.picture) return showError(new Error("Load a picture to edit first; then this result can be its mask."));
    backToEditor();
    await loadMask(blob);
  });
  at("restore").addEventListener("click", () => { settings.apply(results.shown.settings); announce("Settings restored."); });
}

function wireForm() {
  at("form").addEventListener("submit", event => { event.preventDefault(); send(); });
  at("form").addEventListener("keydown", event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); } });
  at("cancel").addEventListener("click", () => run.abort?.abort());
  settings.control("model").addEventListener("change", () => { showModelState(settings.model); showReferences(); showSamples(); });
  at("dice").addEventListener("click", () => {
    settings.control("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    settings.keep();
  });
  at("lock").addEventListener("click", () => {
    isLocked = !isLocked;
    at("lock").setAttribute("aria-pressed", String(isLocked));
    settings.control("seed").value = isLocked && lastSeed !== null ? lastSeed : "";
  });
  for (const button of document.querySelectorAll("[data-language]")) {
    button.addEventListener("click", () => { language = button.dataset.language; showSnippet(); });
  }
  at("key-open").addEventListener("click", () => { at("key").value = key(); at("key-dialog").showModal(); });
  at("key-dialog").addEventListener("close", () => {
    try { sessionStorage.setItem(KEY, at("key").value); } catch { /* the field keeps it */ }
    at("openapi").hidden = Boolean(key());  // links send no key
    refresh();
  });
}

startTheme();
wireEditor();
wirePictures();
wireResults();
wireForm();
settings.recall();
results.load().catch(error => showError(error));
refreshForever();
