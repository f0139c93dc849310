// The playground of an endpoint: one form, the pictures it asks for, and what this tab has drawn so far.
// Texts from people and from the model reach the page as text, never as markup.
"use strict";

const ROUTE = "v1/images/generations";
const FIELDS = ["prompt", "negative_prompt", "n", "steps", "guidance_scale", "size", "seed", "key"];
const RETRY_S = 2;
const SMALL_PX = 160;            // up to here pixels are shown as squares
const MOST_REMEMBERED = 40;      // requests in the history
const MOST_HELD_CHARS = 48e6;    // of pictures in memory
const MOST_STORED_CHARS = 3e6;   // of pictures that outlive a reload; browsers give a page 5 million
const NEAREST = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";

const at = (id) => document.getElementById(id);
const make = (name, text = "", more = {}) => Object.assign(document.createElement(name), { textContent: text, ...more });

let limits = { max_partial_images: 3, model: null };
let work = null;                 // AbortController of the request at work
let memory = [];                 // newest first: {body, pictures: [{b64, format, seed, version, size, seconds}]}

// The form

function number(id) {
  const input = at(id);
  if (input.validity.badInput) throw fieldProblem(id, "Expected a number.");
  return input.value === "" ? undefined : Number(input.value);
}

function wish() {
  const other = at("size").value === "other";
  const body = {
    prompt: at("prompt").value,
    negative_prompt: at("negative_prompt").value || undefined,
    n: number("n"), steps: number("steps"), guidance_scale: number("guidance_scale"),
    size: other ? `${at("width").value}x${at("height").value}` : at("size").value,
    seed: number("seed"),
  };
  return JSON.parse(JSON.stringify(body));  // without what was left out
}

function fill(body) {
  for (const id of ["prompt", "negative_prompt", "n", "steps", "guidance_scale", "seed"]) at(id).value = body[id] ?? "";
  const size = body.size ?? "auto";
  const listed = [...at("size").options].some((option) => option.value === size);
  at("size").value = listed ? size : "other";
  if (!listed) [at("width").value, at("height").value] = size.split("x");
  follow();
}

/** Bring everything that depends on the form up to date. */
function follow() {
  for (const slider of document.querySelectorAll("[data-of]")) slider.value = at(slider.dataset.of).value || slider.value;
  at("any-seed").hidden = at("seed").value === "";
  at("other-size").hidden = at("size").value !== "other";
  try {
    const quoted = JSON.stringify(wish()).replaceAll("'", "'\\''");
    const key = at("key-field").hidden && !savedKey() ? "" : " -H \"Authorization: Bearer $FRESCO_API_KEY\"";
    const url = new URL(ROUTE, location.href);
    at("curl").textContent = `curl -s ${url}${key} -H 'Content-Type: application/json' -d '${quoted}'`;
  } catch { /* a number is being typed */ }
}

function useSeed(seed) {
  at("seed").value = seed;
  follow();
  at("seed").scrollIntoView({ block: "nearest", behavior: NEAREST });
  at("seed").focus();
  say(`Seed ${seed} is in the form.`);
}

/** Fit sliders and sizes to what this endpoint and its model can do. */
function adopt(found) {
  limits = found;
  const bounds = { n: found.max_images, steps: found.max_steps, guidance_scale: found.max_guidance_scale };
  for (const [id, most] of Object.entries(bounds))
    for (const input of [at(id), document.querySelector(`[data-of=${id}]`)]) input.max = most;
  if (!adopt.done) [at("steps").value, at("guidance_scale").value] = [found.default_steps, found.default_guidance_scale];
  adopt.done = true;
  if (found.model) offerSizes(found.model, found.max_side_px);
  follow();
}

function offerSizes(model, most) {
  const { width_px: width, height_px: height, size_multiple_px: multiple, min_side_px: least } = model;
  const shapes = [0.5, 1, 1.5, 2, 3, 4, 6, 8].map((times) => [width * times, height * times]);
  for (const times of [1, 2, 4]) shapes.push([width * 1.5 * times, height * times], [width * times, height * 1.5 * times]);
  const can = (side) => side % multiple === 0 && side >= least && side <= most;
  const sizes = shapes.filter(([w, h]) => can(w) && can(h) && !(w === width && h === height));
  const chosen = at("size").value;
  at("size").replaceChildren(make("option", `${width} × ${height}`, { value: "auto" }));
  for (const [w, h] of sizes) at("size").append(make("option", `${w} × ${h}`, { value: `${w}x${h}` }));
  at("size").append(make("option", "another…", { value: "other" }));
  at("size").value = chosen;
  for (const [id, own] of [["width", width], ["height", height]])
    Object.assign(at(id), { min: least, max: most, step: multiple, value: at(id).value || own });
}

// What went wrong, beside the field it blames

const fieldProblem = (param, message) => Object.assign(new Error(message), { param });

function blame(param, message) {
  const id = FIELDS.includes(param) ? param : null;
  at(id ? `fault-${id}` : "fault").textContent = message;
  if (!id) return;
  at(id).setAttribute("aria-invalid", "true");
  at(id).focus();
  say(message);
}

function forgive() {
  for (const fault of document.querySelectorAll(".fault")) fault.textContent = "";
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** Make a sentence of an endpoint's message; beside its field, the field's name is left out. */
function sentence(message, param) {
  const own = FIELDS.includes(param) && message.startsWith(param) ? message.slice(param.length).replace(/^[:\s]+/, "") : message;
  const text = (own || message).trim();
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

async function refusal(response) {
  const answer = await response.json().catch(() => ({}));
  const { message, param } = answer.error ?? { message: `the endpoint answered ${response.status}` };
  if (response.status !== 401) return fieldProblem((param ?? "").split(".")[0], sentence(message, param));
  at("key-field").hidden = false;
  return fieldProblem("key", sentence(message));
}

// Talking to the endpoint

const savedKey = () => { try { return sessionStorage.getItem("fresco.key") ?? ""; } catch { return ""; } };
const keep = (name, value) => { try { sessionStorage.setItem(name, value); return true; } catch { return false; } };
const say = (text) => { at("said").textContent = text; };

function headers() {
  if (!at("key-field").hidden && at("key").value) keep("fresco.key", at("key").value.trim());
  const key = at("key").value.trim() || savedKey();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

/** Show what serves; true when a model does. */
async function look(signal) {
  let status = { status: "away" };
  try {
    status = await (await fetch("readyz", { signal, cache: "no-store" })).json();
  } catch (problem) {
    if (signal?.aborted) throw problem;
  }
  showServed(status);
  return status.status === "ready";
}

/** A model that loads is waited for, and so is a server that is away. */
async function untilReady(signal) {
  while (!await look(signal)) await pause(RETRY_S, signal);
}

/** Look until a model serves; who asks meanwhile waits for the same. */
function watch() {
  watch.running ??= untilReady().finally(() => { watch.running = null; });
  return watch.running;
}

function showServed(status) {
  const words = {
    ready: () => [["Version", status.model_version], ["trained on", status.dataset], ["run", status.run_id]]
      .filter(([, value]) => value != null).map(([key, value]) => `${key} ${value}`).join(" · ") || "Ready",
    loading: () => "The model is loading. This page goes on by itself when it is ready.",
    failed: () => `The model could not be loaded: ${sentence(status.error ?? "no reason was given")} Trying again by itself.`,
    away: () => "The endpoint does not answer. Trying again by itself.",
  };
  at("served").textContent = (words[status.status] ?? (() => `The model is ${status.status}.`))();
  at("served").dataset.state = { away: "failed" }[status.status] ?? status.status;
}

async function ask(body, signal) {
  const asked = { ...body, stream: true, partial_images: limits.max_partial_images };
  for (;;) {
    const sent = { method: "POST", headers: headers(), body: JSON.stringify(asked), signal };
    const response = await fetch(ROUTE, sent);
    if (response.ok) return response;
    if (response.status !== 503) throw await refusal(response);
    progress("The model is loading; your picture is next.");
    say("The model is loading; your picture is drawn when it is ready.");
    await pause(Number(response.headers.get("Retry-After")) || RETRY_S, signal);
    await untilReady(signal);
  }
}

/** Read server-sent events: yields the JSON of each; comments, which keep the connection alive, are skipped. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data.trim() && data.trim() !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Drawing

const source = (picture) => `data:image/${/^(png|jpeg|webp)$/.test(picture.format) ? picture.format : "png"};base64,${picture.b64}`;
const sides = (size) => (/^\d+x\d+$/.test(size) ? size.split("x").map(Number) : [1, 1]);

function makeFrame(size) {
  const figure = make("figure");
  const frame = make("div", "", { className: "frame" });
  frame.style.aspectRatio = sides(size).join(" / ");
  figure.dataset.state = "waiting";
  figure.append(frame, make("figcaption", "waiting"));
  return figure;
}

function paint(figure, picture, prompt, share) {
  const frame = figure.querySelector(".frame");
  frame.style.aspectRatio = sides(picture.size).join(" / ");
  figure.dataset.state = share < 1 ? "partial" : "done";
  const small = Math.max(...sides(picture.size)) <= SMALL_PX;
  const alt = share < 1 ? `${prompt} (taking shape)` : prompt;
  const bar = make("span", "", { className: "bar" });
  bar.style.width = `${share * 100}%`;
  frame.replaceChildren(make("img", "", { src: source(picture), alt, className: small ? "pixels" : "" }), bar);
  const caption = figure.querySelector("figcaption");
  if (share < 1) return void (caption.textContent = "taking shape");
  const seed = make("button", `seed ${picture.seed}`, { type: "button", title: "Draw from this seed again" });
  seed.addEventListener("click", () => useSeed(picture.seed));
  const file = make("a", "Download", { href: source(picture), download: `fresco-${picture.seed}.${picture.format}` });
  caption.replaceChildren(seed);
  if (picture.version != null) caption.append(make("span", `version ${picture.version}`));
  caption.append(make("span", picture.size.replace("x", " × ")), file);
}

/** Which picture of the request an event shows: by its index, else by its seed, else the first that is unfinished. */
function place(event, body, done) {
  const named = event.index ?? event.image_index ?? (body.seed != null && event.seed != null ? event.seed - body.seed : null);
  if (named != null && named >= 0 && named < done.length) return named;
  return Math.max(0, done.findIndex((picture) => !picture));
}

async function receive(response, body, figures, done, started) {
  const header = response.headers.get("x-fresco-model-version");
  const parts = limits.max_partial_images + 1;
  for await (const event of events(response)) {
    if (event.error) throw fieldProblem(event.error.param, sentence(event.error.message, event.error.param));
    if (!event.b64_json) continue;
    const index = place(event, body, done);
    const seconds = (performance.now() - started) / 1000;
    const seed = event.seed ?? (body.seed != null ? body.seed + index : null);
    const picture = { b64: event.b64_json, format: event.output_format ?? "png", size: event.size ?? "", seed, seconds,
      version: event.model_version ?? header };
    const finished = event.type.endsWith(".completed");
    paint(figures[index], picture, body.prompt, finished ? 1 : ((event.partial_image_index ?? 0) + 1) / parts);
    if (finished) done[index] = picture;
  }
  const missing = done.filter((picture) => !picture).length;
  if (missing) throw new Error(`The stream ended before ${missing === 1 ? "a picture was" : `${missing} pictures were`} finished.`);
}

const progress = (text) => { at("progress").textContent = text; };

function busy(on) {
  at("draw").disabled = on;
  at("cancel").hidden = !on;
  at("stage").setAttribute("aria-busy", String(on));
}

async function draw(event) {
  event?.preventDefault();
  if (work) return;
  forgive();
  let body;
  try { body = wish(); } catch (problem) { return blame(problem.param, problem.message); }
  work = new AbortController();
  const before = [[...at("stage").children], at("asked").textContent];
  const count = Math.floor(Math.min(Math.max(body.n ?? 1, 1), limits.max_images ?? 8));
  const own = limits.model ? `${limits.model.width_px}x${limits.model.height_px}` : "";
  const figures = Array.from({ length: count }, () => makeFrame(body.size === "auto" ? own : body.size));
  const done = Array(count).fill(null);
  const started = performance.now();
  show(figures, body.prompt);
  busy(true);
  say("Drawing.");
  progress("drawing…");
  const ticking = setInterval(() => progress(`drawing, ${Math.round((performance.now() - started) / 1000)} s`), 1000);
  try {
    await receive(await ask(body, work.signal), body, figures, done, started);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    progress(`${count === 1 ? "drawn" : `${count} pictures`} in ${seconds} s`);
    say(`${count === 1 ? "The picture is" : `${count} pictures are`} drawn.`);
  } catch (problem) {
    const left = figures.filter((_, index) => done[index]);
    if (left.length) show(left, body.prompt); else show(before[0], before[1]);
    stopped(problem);
  } finally {
    clearInterval(ticking);
    remember(body, done.filter(Boolean));
    work = null;
    busy(false);
    watch();  // another version may serve by now
  }
}

function stopped(problem) {
  const cancelled = work.signal.aborted;
  progress(cancelled ? "cancelled" : "");
  if (cancelled) say("Cancelled.");
  else if (problem instanceof TypeError) blame(null, `The endpoint did not answer: ${sentence(problem.message)}`);
  else blame(problem.param, problem.message);
}

function show(children, prompt) {
  at("asked").textContent = prompt;
  at("stage").replaceChildren(...children);
  at("stage").className = { 1: "one", 2: "two", 4: "two" }[children.length] ?? "";
  if (matchMedia("(max-width: 800px)").matches && work) at("shown").scrollIntoView({ block: "start", behavior: NEAREST });
}

// What this tab has drawn

/** The newest entries that fit; the bound is on characters, which is what browsers count too. */
function fitting(entries, most) {
  let chars = 0;
  const size = (entry) => entry.body.prompt.length + entry.pictures.reduce((sum, picture) => sum + picture.b64.length + 200, 200);
  return entries.slice(0, MOST_REMEMBERED).filter((entry) => (chars += size(entry)) <= most);
}

function remember(body, pictures) {
  if (!pictures.length) return;
  memory = fitting([{ body, pictures }, ...memory], MOST_HELD_CHARS);
  keep("fresco.history", JSON.stringify(fitting(memory, MOST_STORED_CHARS)));
  list(memory[0]);
}

function list(current) {
  at("past").hidden = !memory.length;
  at("history").replaceChildren(...memory.map((entry) => {
    const { body, pictures } = entry;
    const button = make("button", "", { type: "button", title: body.prompt });
    button.setAttribute("aria-label", `Show again and put into the form: ${body.prompt}`);
    if (entry === current) button.setAttribute("aria-current", "true");
    const small = Math.max(...sides(pictures[0].size)) <= SMALL_PX;
    button.append(make("img", "", { src: source(pictures[0]), alt: "", className: small ? "pixels" : "" }));
    if (pictures.length > 1) button.append(make("small", String(pictures.length)));
    button.addEventListener("click", () => recall(entry));
    const item = make("li");
    item.append(button);
    return item;
  }));
}

function recall(entry) {
  if (work) return say("A picture is being drawn; cancel it first.");
  forgive();
  fill(entry.body);
  showAgain(entry);
  progress("");
  list(entry);
  say("The prompt and its settings are in the form.");
}

function showAgain({ body, pictures }) {
  show(pictures.map((picture) => {
    const figure = makeFrame(picture.size);
    paint(figure, picture, body.prompt, 1);
    return figure;
  }), body.prompt);
}

function forget() {
  memory = [];
  keep("fresco.history", "[]");
  list(null);
}

function restoreHistory() {
  try {
    memory = JSON.parse(sessionStorage.getItem("fresco.history") ?? "[]");
    list(memory[0]);
    if (memory[0]) showAgain(memory[0]);
  } catch { memory = []; }
}

async function describeFields() {
  if (!at("reference").open || at("fields").children.length) return;
  const schema = await (await fetch("openapi.json")).json();
  for (const [name, field] of Object.entries(schema.components.schemas.ImagesRequest.properties)) {
    const row = make("tr");
    const kinds = (field.anyOf ?? [field]).map((kind) => kind.type).filter((kind) => kind && kind !== "null");
    row.append(make("td", name), make("td", kinds.join(" or ")), make("td", field.description ?? ""));
    at("fields").append(row);
  }
}

async function start() {
  at("form").addEventListener("submit", draw);
  at("form").addEventListener("input", (event) => {
    if (event.target.dataset.of) at(event.target.dataset.of).value = event.target.value;
    follow();
  });
  at("any-seed").addEventListener("click", () => { at("seed").value = ""; follow(); at("seed").focus(); });
  at("cancel").addEventListener("click", () => work?.abort());
  at("forget").addEventListener("click", forget);
  at("reference").addEventListener("toggle", describeFields);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw(event);
    if (event.key === "Escape") work?.abort();
  });
  follow();
  restoreHistory();
  const settings = async () => adopt(await (await fetch("playground.json", { cache: "no-store" })).json());
  await settings().catch(() => {});  // the endpoint is away: what follows says so
  await watch();
  if (!limits.model) await settings();
}

start();
