// Depth as a cloud of points that turns: drag it, or use the arrow keys. Part of the viewer.
const FIELD_OF_VIEW = 60; // degrees across the picture; a photo does not say what its camera had

function solidButton(root, node, task) {
  const button = make("button", { type: "button", class: "solid", "aria-pressed": "false", text: "Show in 3D" });
  const canvas = make("canvas", { class: "cloud", hidden: "", tabindex: "0", role: "img", width: "640", height: "480",
    "aria-label": `${task.name} of the right column as points; arrow keys turn it` });
  const note = make("p", { class: "legend", hidden: "", text:
    `Right column. A camera with a field of view of ${FIELD_OF_VIEW}° is assumed. Drag, or use the arrow keys.` });
  const turn = { yaw: 0.35, pitch: 0.2 };
  node.append(button, canvas, note);
  node._solid = () => { if (!canvas.hidden) cloud(root, canvas, task, turn); };
  const toggle = (shown) => {
    canvas.hidden = note.hidden = !shown;
    state.solid[task.name] = shown;
    button.setAttribute("aria-pressed", String(shown));
    button.textContent = shown ? "Hide 3D" : "Show in 3D";
    node._solid();
  };
  button.addEventListener("click", () => toggle(canvas.hidden));
  canvas.addEventListener("pointermove", (event) => {
    if (!(event.buttons & 1)) return;
    turn.yaw += event.movementX / 150; turn.pitch += event.movementY / 150;
    node._solid();
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
    if (!move) return;
    event.preventDefault();
    turn.yaw += move[0]; turn.pitch += move[1];
    node._solid();
  });
  toggle(Boolean(state.solid[task.name]));
}

function pixelsOf(view) {
  const image = new Image();
  image.src = view.photo;
  return image.decode().then(() => {
    const small = make("canvas", { width: view.grid[0], height: view.grid[1] });
    const context = small.getContext("2d");
    context.drawImage(image, 0, 0, ...view.grid);
    return context.getImageData(0, 0, ...view.grid).data;
  });
}

async function cloud(root, canvas, task, turn) {
  const view = root._view, [width, height] = view.grid;
  const found = task.grids[state.right] || task.grids[Object.keys(task.grids)[0]];
  view.pixels = view.pixels || pixelsOf(view);
  const colours = await view.pixels;
  const focal = width / 2 / Math.tan((FIELD_OF_VIEW * Math.PI) / 360);
  const depths = Array.from(found.raw, (value) => (value === NONE ? null : found.low + found.step * value));
  const known = depths.filter((value) => value !== null).sort((a, b) => a - b);
  const middle = known[known.length >> 1] || 1;
  const [sy, cy, sp, cp] = [Math.sin(turn.yaw), Math.cos(turn.yaw), Math.sin(turn.pitch), Math.cos(turn.pitch)];
  const points = [];
  depths.forEach((z, cell) => {
    if (z === null) return;
    const x = (((cell % width) + 0.5 - width / 2) * z) / focal;
    const y = ((Math.floor(cell / width) + 0.5 - height / 2) * z) / focal;
    const d = z - middle;
    const [x1, z1] = [x * cy - d * sy, x * sy + d * cy];
    const [y1, z2] = [y * cp - z1 * sp, y * sp + z1 * cp];
    points.push([x1, y1, z2 + 1.6 * middle, cell]);
  });
  points.sort((a, b) => b[2] - a[2]);
  const context = canvas.getContext("2d"), scale = (canvas.width * focal * 1.3) / width;
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const [x, y, z, cell] of points) {
    if (z < 0.1 * middle) continue;
    context.fillStyle = `rgb(${colours[4 * cell]},${colours[4 * cell + 1]},${colours[4 * cell + 2]})`;
    const size = Math.max(2, (1.3 * scale * middle) / focal / z);
    context.fillRect(canvas.width / 2 + (x * scale) / z, canvas.height / 2 + (y * scale) / z, size, size);
  }
}
