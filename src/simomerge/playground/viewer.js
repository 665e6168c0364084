// The viewer: one card per task with a movable line between two columns, values under the pointer, legends.
// It runs when the component is created; `props.value` is what playground/view.py returns.
const NONE = 65535;
const state = { left: "", right: "", overlay: false, solid: {}, at: null };

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(Boolean));
  return node;
}

function grid(values) {
  const bytes = Uint8Array.from(atob(values.data), (c) => c.charCodeAt(0));
  const raw = new Uint16Array(bytes.buffer);
  return { raw, low: values.low, step: values.step, planes: values.planes };
}

function reading(found, cell, cells) {
  const out = [];
  for (let plane = 0; plane < found.planes; plane++) {
    const value = found.raw[plane * cells + cell];
    out.push(value === NONE ? null : found.low + found.step * value);
  }
  return out;
}

function inWords(task, value, expert) {
  if (value[0] === null) return "no value";
  if (task.kind === "segmentation") return task.classes[Math.round(value[0])];
  if (task.kind === "normals") {
    const text = `(${value.map((each) => each.toFixed(2)).join(", ")})`;
    if (!expert || expert === value) return text;
    const dot = value.reduce((sum, each, i) => sum + each * expert[i], 0);
    return `${text}, ${((Math.acos(Math.max(-1, Math.min(1, dot))) * 180) / Math.PI).toFixed(0)}° from the expert`;
  }
  return `${value.map((each) => each.toPrecision(3)).join(", ")} ${task.unit}`.trim();
}

function legendOf(task) {
  const legend = task.legend;
  if (legend.names && legend.names.length) {
    const items = legend.names.map((each) =>
      make("li", {}, make("span", { class: "swatch", style: `background:${each.colour}` }), each.name));
    return make("ul", { class: "classes", "aria-label": `Colours of ${task.name}` }, ...items);
  }
  if (legend.ramp) {
    return make("div", { class: "ramp" }, make("span", { text: legend.low }),
      make("i", { style: `background:linear-gradient(90deg, ${legend.ramp.join(",")})` }),
      make("span", { text: legend.high }));
  }
  return null;
}

function show(root, view) {
  const keys = view.columns.map((each) => each.key);
  const wanted = (now, fallback) => (keys.includes(now) ? now : fallback);
  const last = keys[keys.length - 1];
  state.left = wanted(state.left, keys[1] || keys[0]);
  state.right = wanted(state.right, keys.includes("repaired") ? "repaired" : last);
  const bar = root.querySelector(".bar");
  for (const side of ["left", "right"]) {
    const select = bar.querySelector(`select.${side}`);
    select.replaceChildren(...view.columns.map((each) => make("option", { value: each.key, text: each.label })));
    select.value = state[side];
  }
  root._view = { ...view, tasks: view.tasks.map((task) => ({ ...task,
    grids: Object.fromEntries(Object.entries(task.values).map(([key, values]) => [key, grid(values)])) })) };
  const photo = { name: "photo", kind: "photo", legend: {}, grids: {}, distances: {}, pictures: {} };
  root._view.tasks.unshift(photo);
  root.querySelector(".cards").replaceChildren(...root._view.tasks.map((task) => card(root, task)));
  bar.hidden = !view.tasks.length;
  draw(root);
}

function card(root, task) {
  const view = root._view;
  const stage = make("div", { class: "stage", tabindex: "0", role: "group", style:
    `aspect-ratio:${view.size[0]} / ${view.size[1]}`, "aria-label":
    `${task.name}: arrow keys move the point whose values are shown` },
    make("img", { class: "under", draggable: "false" }), make("img", { class: "over", draggable: "false" }),
    make("span", { class: "line" }), make("span", { class: "point", hidden: "" }));
  const readout = make("dl", { class: "readout", "aria-live": "polite" });
  const node = make("section", { class: "card", "data-task": task.name }, make("h3", { text: task.name }), stage,
    make("p", { class: "sides" }), legendOf(task), readout);
  stage.addEventListener("pointermove", (event) => {
    const box = stage.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    if (event.buttons & 1) { root.querySelector(".split").value = Math.round(100 * x); split(root); }
    point(root, x, y);
  });
  stage.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [x, y] = state.at || [0.5, 0.5];
    point(root, x + move[0] / view.grid[0], y + move[1] / view.grid[1]);
  });
  if (task.solid) solidButton(root, node, task);
  return node;
}

function source(view, task, key) {
  return key === "photo" || task.kind === "photo" ? view.photo : task.pictures[key];
}

function draw(root) {
  const view = root._view;
  const label = (key) => view.columns.find((each) => each.key === key).label;
  root.querySelectorAll(".card").forEach((node, number) => {
    const task = view.tasks[number];
    for (const [name, key] of [["under", state.left], ["over", state.right]]) {
      const image = node.querySelector(`.${name}`);
      const found = source(view, task, key);
      image.src = found || view.photo;
      image.alt = found ? `${task.name}, ${label(key)}` : `${label(key)} has no ${task.name}`;
      if (task.kind === "photo") image.alt = name === "under" ? "the photo" : "";
    }
    node.querySelector(".stage").style.backgroundImage = state.overlay ? `url(${view.photo})` : "none";
    node.classList.toggle("overlay", state.overlay);
    if (task.kind === "photo") return;
    const about = (key) => [label(key), task.distances[key]].filter(Boolean).join(": ");
    node.querySelector(".sides").replaceChildren(
      make("span", { text: `left: ${about(state.left)}` }), make("span", { text: `right: ${about(state.right)}` }));
    if (node._solid) node._solid();
  });
  split(root);
  if (state.at) point(root, ...state.at);
}

function split(root) {
  root.querySelector(".cards").style.setProperty("--split", `${root.querySelector(".split").value}%`);
}

function point(root, x, y) {
  const view = root._view, [width, height] = view.grid;
  x = Math.max(0, Math.min(0.9999, x)); y = Math.max(0, Math.min(0.9999, y));
  state.at = [x, y];
  const cell = Math.floor(y * height) * width + Math.floor(x * width);
  root.querySelectorAll(".card").forEach((node, number) => {
    const task = view.tasks[number], mark = node.querySelector(".point");
    mark.hidden = false;
    mark.style.left = `${100 * x}%`; mark.style.top = `${100 * y}%`;
    const values = Object.entries(task.grids).map(([key, found]) => [key, reading(found, cell, width * height)]);
    const expert = (values.find(([key]) => key === "experts") || [])[1];
    node.querySelector(".readout").replaceChildren(...values.flatMap(([key, value]) => [
      make("dt", { text: view.columns.find((each) => each.key === key).label }),
      make("dd", { text: inWords(task, value, expert) })]));
  });
}

const frame = element.querySelector(".viewer");
frame.querySelector(".split").addEventListener("input", () => split(frame));
frame.querySelectorAll("select").forEach((select) => select.addEventListener("change", () => {
  state[select.className] = select.value;
  draw(frame);
}));
frame.querySelector(".over-photo").addEventListener("change", (event) => {
  state.overlay = event.target.checked;
  draw(frame);
});
function update() { if (props.value && props.value.tasks) show(frame, props.value); }
watch("value", update);
update();
