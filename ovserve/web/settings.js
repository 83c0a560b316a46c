// The form of settings: which fields a model has, their values, errors at the field they name, and the browser's copy of them.

const KEPT = "ovserve.settings";
// Fields of the API that the page shows under another name.
const SHOWN_AS = {image: null, mask: null, width: "size", height: "size", num_images_per_prompt: "n", rng_seed: "seed"};

export class Settings {
  constructor(form) {
    this.form = form;
    this.models = new Map();
    this.hasPicture = false;
    const strength = this.control("strength");
    strength.addEventListener("input", () => { strength.dataset.unset = "false"; this.showStrength(); });
    form.addEventListener("input", event => { this.clearError(event.target.name); this.keep(); });
    this.control("model").addEventListener("change", () => this.showFeatures());
  }

  control(name) { return this.form.elements.namedItem(name); }
  get model() { return this.models.get(this.control("model").value) || null; }

  // Fill the list of models; keep the choice where that model is still there.
  setModels(models) {
    const select = this.control("model"), before = select.value || this.wanted;
    this.models = new Map(models.map(model => [model.id, model]));
    const options = models.filter(model => !model.alias_of)
      .map(model => new Option(nameOf(model), model.id));
    if ([...select.options].map(option => option.text).join() !== options.map(option => option.text).join()) select.replaceChildren(...options);
    if (this.models.has(before)) select.value = before;
    this.showFeatures();
  }

  // Show the fields that the model has, with its defaults.
  showFeatures() {
    const model = this.model;
    if (!model) return;
    const features = featuresOf(model), defaults = model.defaults || {};
    for (const field of this.form.querySelectorAll("[data-feature]")) {
      const feature = field.dataset.feature;
      field.hidden = !features[feature] || (feature === "strength" && !this.hasPicture);
    }
    for (const name of ["num_inference_steps", "guidance_scale"]) this.control(name).placeholder = defaults[name] ?? "";
    const limits = model.limits || {};
    setMaximum(this.control("n"), limits.n);
    setMaximum(this.control("num_inference_steps"), limits.num_inference_steps);
    this.showSchedulers(model.schedulers || []);
    const sizes = ["auto", model.native_size].filter(Boolean);
    document.getElementById("sizes").replaceChildren(...sizes.map(size => new Option(size)));
    this.showStrength();
  }

  showSchedulers(names) {
    const select = this.control("scheduler"), before = select.value;
    if (select.options.length === names.length + 1) return;
    select.replaceChildren(new Option("the model's", ""), ...names.map(name => new Option(name, name)));
    select.value = names.includes(before) ? before : "";
  }

  showStrength() {
    const control = this.control("strength"), value = this.model?.defaults?.strength;
    if (control.dataset.unset === "true") control.value = value ?? 0.7;
    document.getElementById("strength-value").textContent =
      control.dataset.unset === "true" ? `${value ?? ""} (the model's default)` : Number(control.value).toFixed(2);
  }

  setHasPicture(hasPicture) {
    this.hasPicture = hasPicture;
    this.showFeatures();
  }

  // Return the fields to send, by name, as text; without those that are empty or not shown.
  fields() {
    const found = {};
    for (const control of this.form.elements) {
      if (!control.name || control.closest("[hidden]") || control.value.trim() === "") continue;
      if (control.name === "strength" && control.dataset.unset === "true") continue;
      if (!this.hasPicture && ["mask_blur", "resize_mode", "strength"].includes(control.name)) continue;
      found[control.name] = control.name === "size" ? control.value.trim().replace(/ ?[X×*] ?/, "x") : control.value;
    }
    return found;
  }

  // Set all fields: those that are not in `settings` become empty.
  apply(settings) {
    for (const control of this.form.elements) {
      if (!control.name || control.name === "model") continue;
      const value = settings[control.name] ?? "";
      if (control.name === "strength") control.dataset.unset = String(value === "");
      if (control.tagName === "SELECT" && ![...control.options].some(option => option.value === value)) control.value = "";
      else if (control.type !== "range" || value !== "") control.value = value;
    }
    if (this.models.has(settings.model)) this.control("model").value = settings.model;
    this.showFeatures();
    this.keep();
  }

  keep() {
    try { localStorage.setItem(KEPT, JSON.stringify(this.fields())); } catch { /* storage is off or full */ }
  }

  recall() {
    let settings = null;
    try { settings = JSON.parse(localStorage.getItem(KEPT)); } catch { /* storage is off, or not ours */ }
    if (!settings || typeof settings !== "object") return;
    this.wanted = settings.model;
    this.apply(settings);
  }

  // Show an error at the field that it names. Returns false if the form has no such field.
  showError(param, message) {
    const name = param in SHOWN_AS ? SHOWN_AS[param] : param;
    const field = name && this.form.querySelector(`[data-field="${CSS.escape(name)}"]`);
    if (!field) return false;
    field.hidden = false;
    const box = field.closest("details");
    if (box) box.open = true;
    const control = this.control(name), text = document.createElement("p");
    text.className = "error";
    text.id = `error-${name}`;
    text.textContent = message;
    field.append(text);
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-describedby", text.id);
    control.focus();
    return true;
  }

  clearError(name) {
    const control = name && this.control(name);
    if (!control?.hasAttribute?.("aria-invalid")) return;
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
    document.getElementById(`error-${name}`)?.remove();
  }

  clearErrors() {
    for (const control of this.form.querySelectorAll("[aria-invalid]")) this.clearError(control.name);
  }
}

// Return what the list of models shows: adapters come with the name of their model.
function nameOf(model) {
  const name = model.parent ? `${model.id} (adapter of ${model.parent})` : model.id;
  return model.ready ? name : `${name} (${model.reason})`;
}

function setMaximum(control, value) {
  if (value === undefined || value === null) control.removeAttribute("max");
  else control.max = value;
}

// What the model can do. A server that says nothing about a feature is taken to have it: a wrong field gets its own error.
export function featuresOf(model) {
  const features = model.features || {};
  return {
    negative_prompt: features.negative_prompt ?? true,
    guidance: (features.guidance ?? "") !== "none",
    strength: features.strength ?? true,
    schedulers: (model.schedulers || []).length > 0,
    mask: features.masks ?? features.mask ?? true,
    references: features.reference_images ?? 0,
  };
}
