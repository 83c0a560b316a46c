// The page at "/status": reads /v1/status every two seconds; draws the last minutes. Changes nothing on the server.

const EVERY_MS = 2000, POINTS = 120;
const KEY = "ovserve.admin-key";
const at = id => document.getElementById(id);
const series = {queued: [], running: [], rate: [], step: [], rows: [], memory: []};
const FRACTIONS = new Set(["rate", "rows"]);
const MIB = 1 << 20;
let before = null;  // {at, done, work} of the last answer

const key = () => { try { return sessionStorage.getItem(KEY) || ""; } catch { return ""; } };

function row(values, numbers = new Set()) {
  const line = document.createElement("tr");
  values.forEach((value, k) => {
    const cell = document.createElement("td");
    cell.textContent = value;
    if (numbers.has(k)) cell.className = "number";
    line.append(cell);
  });
  return line;
}

function duration(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"]].filter(([size]) => seconds >= size).slice(0, 1);
  return parts.length ? `${Math.floor(seconds / parts[0][0])} ${parts[0][1]}` : `${Math.floor(seconds)} s`;
}

function plot(name, value, unit) {
  const points = series[name];
  points.push(value);
  if (points.length > POINTS) points.shift();
  // The width is the time so far, at most that of POINTS; the text below names it.
  const top = Math.max(1, ...points), width = POINTS / Math.max(1, points.length - 1);
  const path = points.map((point, k) => `${k ? "L" : "M"}${(k * width).toFixed(1)} ${38 - 36 * point / top}`).join("");
  at(`plot-${name}`).querySelector("path").setAttribute("d", path);
  at(`now-${name}`).textContent = `${value.toFixed(FRACTIONS.has(name) ? 1 : 0)} ${unit}; highest in ${duration(points.length * EVERY_MS / 1000)}: ${Math.max(...points).toFixed(0)}`;
}

const NO_WORK = {calls: 0, rows: 0, call_s: 0};

// Calls of the denoiser since the last answer.
function since(model) {
  const old = before?.work[model.name] ?? NO_WORK;
  return {calls: model.calls - old.calls, rows: model.rows - old.rows, call_s: model.call_s - old.call_s};
}

// The same; where there was none, those since the start of the server.
const shownWork = model => since(model).calls > 0 ? since(model) : model;
const stepMs = work => work.calls ? work.call_s / work.calls * 1000 : 0;
const rowsOf = work => work.calls ? work.rows / work.calls : 0;

function show(status) {
  at("server").textContent = `${status.draining ? "Shutting down" : status.ready ? "Ready" : "Not ready"} · version ${status.version} · up ${duration(status.uptime_s)}`;
  at("server").classList.toggle("bad", !status.ready);
  at("models").replaceChildren(...status.models.map(model => row(
    [model.name, model.ready ? "ready" : model.reason, model.engine, model.queued, model.running, model.capacity, model.job_s.toFixed(2),
      model.calls ? stepMs(shownWork(model)).toFixed(1) : "–", model.calls ? rowsOf(shownWork(model)).toFixed(1) : "–",
      model.memory_bytes ? (model.memory_bytes / MIB).toFixed(0) : "–"],
    new Set([3, 4, 5, 6, 7, 8, 9]))));
  at("workers").replaceChildren(...status.workers.map(worker => row(
    [worker.name, worker.phase, worker.jobs, worker.jobs_done, worker.silent_s.toFixed(1)], new Set([2, 3, 4]))));
  at("errors").replaceChildren(...status.errors.map(error => row(
    [new Date(error.at * 1000).toLocaleTimeString(), error.status, error.code, error.message, error.request])));
  at("no-errors").hidden = status.errors.length > 0;
  const sum = name => status.models.reduce((total, model) => total + model[name], 0);
  plot("queued", sum("queued"), "waiting");
  plot("running", sum("running"), "running");
  const together = status.models.map(since).reduce((total, each) =>
    ({calls: total.calls + each.calls, rows: total.rows + each.rows, call_s: total.call_s + each.call_s}), NO_WORK);
  plot("step", stepMs(together), "ms");
  plot("rows", rowsOf(together), "rows");
  plot("memory", sum("memory_bytes") / MIB, "MiB");
  const work = Object.fromEntries(status.models.map(model => [model.name, model]));
  const now = {at: performance.now(), work, done: status.workers.reduce((total, worker) => total + worker.jobs_done, 0)};
  if (before) plot("rate", Math.max(0, now.done - before.done) / (now.at - before.at) * 60000, "a minute");
  before = now;
}

async function refresh() {
  try {
    const reply = await fetch("/v1/status", {headers: key() ? {authorization: "Bearer " + key()} : {}});
    const document = await reply.json();
    if (reply.ok) { at("key-form").hidden = true; return show(document); }
    at("server").textContent = reply.status === 401 || reply.status === 403 ? "Admin key required" : document.error.message;
    at("server").classList.add("bad");
    at("key-form").hidden = reply.status !== 401 && reply.status !== 403;
    at("key-reason").textContent = document.error.message;
  } catch {
    at("server").textContent = "No connection to the server";
    at("server").classList.add("bad");
  }
}

at("key-form").addEventListener("submit", event => {
  event.preventDefault();
  try { sessionStorage.setItem(KEY, at("key").value); } catch { /* storage is off */ }
  refresh();
});
try { document.documentElement.dataset.theme = localStorage.getItem("ovserve.theme") || ""; } catch { /* storage is off */ }
if (!document.documentElement.dataset.theme) document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";

for (;;) {
  if (document.visibilityState === "visible") await refresh();
  await new Promise(resolve => { setTimeout(resolve, EVERY_MS); });
}
