// The page at "/status": reads /v1/status every two seconds; draws the last minutes. Changes nothing on the server.

const EVERY_MS = 2000, POINTS = 120;
const KEY = "ovserve.admin-key";
const at = id => document.getElementById(id);
const series = {queued: [], running: [], rate: []};
let before = null;  // {at, done} of the last answer

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
  const top = Math.max(1, ...points), first = POINTS - points.length;
  const path = points.map((point, k) => `${k ? "L" : "M"}${first + k} ${38 - 36 * point / top}`).join("");
  at(`plot-${name}`).querySelector("path").setAttribute("d", path);
  at(`now-${name}`).textContent = `${value.toFixed(name === "rate" ? 1 : 0)} ${unit}; highest in ${duration(points.length * EVERY_MS / 1000)}: ${Math.max(...points).toFixed(0)}`;
}

function show(status) {
  at("server").textContent = `${status.draining ? "Shutting down" : status.ready ? "Ready" : "Not ready"} · version ${status.version} · up ${duration(status.uptime_s)}`;
  at("server").classList.toggle("bad", !status.ready);
  at("models").replaceChildren(...status.models.map(model => row(
    [model.name, model.ready ? "ready" : model.reason, model.engine, model.queued, model.running, model.capacity, model.job_s.toFixed(2)],
    new Set([3, 4, 5, 6]))));
  at("workers").replaceChildren(...status.workers.map(worker => row(
    [worker.name, worker.phase, worker.jobs, worker.jobs_done, worker.silent_s.toFixed(1)], new Set([2, 3, 4]))));
  at("errors").replaceChildren(...status.errors.map(error => row(
    [new Date(error.at * 1000).toLocaleTimeString(), error.status, error.code, error.message, error.request])));
  at("no-errors").hidden = status.errors.length > 0;
  const sum = name => status.models.reduce((total, model) => total + model[name], 0);
  plot("queued", sum("queued"), "waiting");
  plot("running", sum("running"), "running");
  const now = {at: performance.now(), done: status.workers.reduce((total, worker) => total + worker.jobs_done, 0)};
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
