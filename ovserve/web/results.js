// The strip of results below the editor, and the view of one result with its before/after slider.

import {allResults, deleteAll, deleteResult, keepResult} from "./history.js";

const at = id => document.getElementById(id);

export class Results extends EventTarget {
  constructor() {
    super();
    this.results = [];
    this.shown = null;
    this.urls = new Map();  // of blobs, by id; revoked when the result is deleted
    at("compare").addEventListener("input", () => this.compare());
    at("frame").addEventListener("pointerdown", event => { at("frame").setPointerCapture(event.pointerId); this.compareAt(event); });
    at("frame").addEventListener("pointermove", event => { if (at("frame").hasPointerCapture(event.pointerId)) this.compareAt(event); });
    at("delete").addEventListener("click", () => this.delete());
    at("clear-results").addEventListener("click", async () => {
      if (!confirm(`Delete all ${this.results.length} results from this browser?`)) return;
      await deleteAll();
      this.hide();
      for (const result of this.results.splice(0)) this.revoke(result.id);
      this.list();
    });
  }

  async load() {
    this.results = await allResults();
    this.list();
  }

  async add(result) {
    this.results.unshift(result);
    try {
      for (const id of await keepResult(result)) {
        this.revoke(id);
        this.results = this.results.filter(each => each.id !== id);
      }
    } catch (error) { this.dispatchEvent(new CustomEvent("unkept", {detail: error})); }
    this.list();
  }

  url(result, part = "blob") {
    const key = `${result.id} ${part}`;
    if (!this.urls.has(key)) this.urls.set(key, URL.createObjectURL(result[part]));
    return this.urls.get(key);
  }

  revoke(id) {
    for (const part of ["blob", "input"]) {
      const key = `${id} ${part}`;
      if (this.urls.has(key)) URL.revokeObjectURL(this.urls.get(key));
      this.urls.delete(key);
    }
  }

  list() {
    at("strip").replaceChildren(...this.results.map(result => {
      const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
      image.src = this.url(result);
      image.alt = `${result.settings.prompt || "variation"}, seed ${result.seed}`;
      image.loading = "lazy";
      button.type = "button";
      button.title = image.alt;
      if (result === this.shown) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => this.show(result));
      button.append(image);
      item.append(button);
      return item;
    }));
    at("no-results").hidden = this.results.length > 0;
    at("clear-results").hidden = this.results.length === 0;
    at("kept").textContent = this.results.length ? `${this.results.length} kept in this browser` : "";
  }

  show(result) {
    this.shown = result;
    at("after").src = this.url(result);
    at("after").alt = result.settings.prompt || "";
    at("before").hidden = at("compare-label").hidden = !result.input;
    if (result.input) at("before").src = this.url(result, "input");
    at("compare").value = 0;
    this.compare();
    at("download").href = this.url(result);
    at("download").download = `ovserve-${result.seed}.${result.blob.type.split("/")[1].replace("jpeg", "jpg")}`;
    const asked = result.settings.model, model = asked && asked !== result.model ? `${result.model} with ${asked}` : result.model;
    at("caption").textContent = [result.settings.prompt, result.size, `seed ${result.seed}`, model, `${result.seconds.toFixed(1)} s`,
      result.revised_prompt && result.revised_prompt !== result.settings.prompt ? `prompt used: ${result.revised_prompt}` : ""]
      .filter(Boolean).join(" · ");
    at("view").hidden = false;
    this.dispatchEvent(new Event("show"));
    this.list();
  }

  hide() {
    if (this.shown === null) return;
    this.shown = null;
    at("view").hidden = true;
    this.dispatchEvent(new Event("hide"));
    this.list();
  }

  // Show the source to the left of the slider's position, the result to its right.
  compare() {
    const value = Number(at("compare").value);
    at("before").style.clipPath = `inset(0 ${100 - value}% 0 0)`;
    at("split").hidden = !this.shown?.input || value === 0 || value === 100;
    at("split").style.left = `${value}%`;
  }

  compareAt(event) {
    if (!this.shown?.input) return;
    const box = at("frame").getBoundingClientRect();
    at("compare").value = Math.round(100 * (event.clientX - box.left) / box.width);
    this.compare();
  }

  async delete() {
    const result = this.shown;
    if (!result) return;
    this.results = this.results.filter(each => each !== result);
    this.hide();
    this.revoke(result.id);
    this.list();
    await deleteResult(result.id);
  }
}
