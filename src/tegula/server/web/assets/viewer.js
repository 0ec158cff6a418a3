// A picture before and after, with one zoom and one place for both.
//
// The server cuts pictures into tiles of several sizes (a pyramid), and only what is in view is
// loaded and drawn, so that a picture of any size moves smoothly. Tiles are decoded beside the
// page's own thread. Lengths in view are pixels of the screen; `zoom` is how many of them one pixel
// of the result has, so that 1 is "1:1" whatever the screen.

import { blob, call } from "./api.js";
import { element } from "./dom.js";
import { createState } from "./state.js";

const MOST_TILES = 192;
const AT_ONCE = 6;
const MOST_ZOOM = 16;
const HARD_FROM = 2; // from here on pixels are shown as squares
const GRAB = 22; // how near to the edge a press takes hold of it
const LOUPE_RADIUS = 75;
const LOUPE_AFTER_MS = 350;
const STEP = 64;

// One picture: its manifest, and the tiles of it that are loaded.
function createLayer(path, manifest, changed) {
  const tiles = new Map();
  const wanted = [];
  let loading = 0;

  function next() {
    while (loading < AT_ONCE && wanted.length) {
      const key = wanted.pop();
      if (tiles.get(key) !== null) continue;
      loading += 1;
      load(key).finally(() => {
        loading -= 1;
        changed();
        next();
      });
    }
  }

  async function load(key) {
    const [level, place] = key.split("/");
    const { kind } = manifest.levels[level];
    try {
      tiles.set(key, await createImageBitmap(await blob(`${path}/${level}/${place}.${kind}`)));
    } catch {
      tiles.set(key, false); // a coarser one stays in its place
    }
    for (const [old, tile] of tiles) {
      if (tiles.size <= MOST_TILES) break;
      if (tile && !old.startsWith(`${manifest.levels.length - 1}/`)) {
        tile.close();
        tiles.delete(old);
      }
    }
  }

  return {
    manifest,
    pending: () => loading + wanted.length,
    // Return a tile, or null if it is not loaded yet; it is then put in the queue, unless `peek` is set.
    tile(level, column, row, peek = false) {
      const key = `${level}/${column}-${row}`;
      const found = tiles.get(key);
      if (found) {
        tiles.delete(key); // the last in the map is the one that was used last
        tiles.set(key, found);
      } else if (found === undefined && !peek) {
        tiles.set(key, null);
        wanted.push(key);
        next();
      }
      return found || null;
    },
    // Forget what has not begun to load: the view has moved on.
    dropQueued() {
      for (const key of wanted.splice(0)) if (tiles.get(key) === null) tiles.delete(key);
    },
    close() {
      wanted.length = 0;
      for (const tile of tiles.values()) if (tile) tile.close();
      tiles.clear();
    },
  };
}

// Draw what of a layer is in a box. `view` has the zoom, the point of the result in the middle, and
// where on the canvas that middle is; `size` is the result's.
function drawLayer(context, layer, size, view, box) {
  const { manifest } = layer, { tile: side, levels } = manifest;
  const pixelSize = (view.zoom * size.width) / manifest.width; // of this layer, on the screen
  const level = Math.min(levels.length - 1, Math.max(0, Math.round(Math.log2(1 / pixelSize))));
  const left = view.middle[0] - view.x * view.zoom, top = view.middle[1] - view.y * view.zoom;
  const across = (view.zoom * size.width) / levels[level].width;
  const down = (view.zoom * size.height) / levels[level].height;
  context.save();
  context.beginPath();
  context.rect(box.left, box.top, box.width, box.height);
  context.clip();
  context.imageSmoothingEnabled = view.zoom < HARD_FROM;
  context.imageSmoothingQuality = "medium";
  const first = [box.left - left, box.top - top], last = [first[0] + box.width, first[1] + box.height];
  const bound = (place, length) => Math.min(Math.ceil(length / side) - 1, Math.max(0, Math.floor(place)));
  for (let row = bound(first[1] / down / side, levels[level].height); row <= bound(last[1] / down / side, levels[level].height); row += 1) {
    for (let column = bound(first[0] / across / side, levels[level].width); column <= bound(last[0] / across / side, levels[level].width); column += 1) {
      const found = nearest(layer, level, column, row);
      if (!found) continue;
      const ends = [
        Math.min((column + 1) * side, levels[level].width),
        Math.min((row + 1) * side, levels[level].height),
      ];
      // Rounded, so that neighbours meet without a seam.
      const x = Math.round(left + column * side * across), y = Math.round(top + row * side * down);
      const width = Math.round(left + ends[0] * across) - x, height = Math.round(top + ends[1] * down) - y;
      context.drawImage(found.tile, ...found.part(ends), x, y, width, height);
    }
  }
  context.restore();
}

// Return the tile at a place, or the part of a coarser one that is there already.
function nearest(layer, level, column, row) {
  const { tile: side, levels } = layer.manifest;
  let shown = null;
  for (let up = 0; level + up < levels.length && !shown; up += 1) {
    const peek = up > 0 && level + up < levels.length - 1;
    const tile = layer.tile(level + up, column >> up, row >> up, peek);
    if (tile) shown = { tile, up };
  }
  if (!shown) return null;
  const { tile, up } = shown, share = 2 ** up;
  return {
    tile,
    part([right, bottom]) {
      const x = (column * side) / share - (column >> up) * side;
      const y = (row * side) / share - (row >> up) * side;
      const width = (right - column * side) / share, height = (bottom - row * side) / share;
      return [x, y, Math.min(width, tile.width - x), Math.min(height, tile.height - y)];
    },
  };
}

// Load a picture and return its viewer: { element, manifest, before, close }.
// `paths` are those of the tiles: `after` and, where there is a source to compare with, `before`.
export async function openViewer(paths, more = []) {
  const redraw = () => schedule();
  const [after, before] = await Promise.all([
    call("GET", paths.after),
    paths.before ? call("GET", paths.before).catch(() => null) : null,
  ]);
  const layers = { after: createLayer(paths.after, after, redraw) };
  if (before) layers.before = createLayer(paths.before, before, redraw);
  const size = { width: after.width, height: after.height };

  const canvas = element("canvas", { role: "img", "aria-label": before ? "The source and the result" : "The result" });
  const tags = ["Source", "Result"].map((text, number) =>
    element("span", { className: `tag ${number ? "right" : "left"}`, textContent: text, hidden: !before }));
  const stage = element("div", { className: "stage", tabIndex: 0, role: "group",
    "aria-label": "Picture: arrow keys move it, plus and minus zoom" }, canvas, ...tags);
  const figure = element("figure", { className: "viewer" }, stage);
  const view = createState({ zoom: 1, x: size.width / 2, y: size.height / 2, cut: 0.5, mode: before ? "slider" : "after",
    flipped: false, fitted: true, loupe: null });
  const context = canvas.getContext("2d");
  let drawing = 0;

  function schedule() {
    drawing ||= requestAnimationFrame(() => {
      drawing = 0;
      draw();
    });
  }

  const ratio = () => window.devicePixelRatio || 1;
  const halves = () => (view.get().mode === "sides" ? 2 : 1);
  const fitting = () =>
    Math.min(1, canvas.width / halves() / size.width, canvas.height / size.height);

  // Return a change with its place kept within the picture, and in the middle where all of it fits.
  function bounded({ x, y, zoom }) {
    const keep = (place, length, seen) =>
      length * zoom <= seen ? length / 2 : Math.min(length - seen / zoom / 2, Math.max(seen / zoom / 2, place));
    return { zoom, x: keep(x, size.width, canvas.width / halves()), y: keep(y, size.height, canvas.height) };
  }

  // Zoom so that the point of the picture at a place of the canvas stays there.
  function zoomTo(zoom, place = middles()[0]) {
    const now = view.get(), middle = middleOf(place);
    const next = Math.min(MOST_ZOOM, Math.max(fitting(), zoom));
    const kept = (axis) => now[axis ? "y" : "x"] + ((place[axis] - middle[axis]) * (1 / now.zoom - 1 / next));
    view.set({ ...bounded({ zoom: next, x: kept(0), y: kept(1) }), fitted: next === fitting() });
  }

  function fit() {
    view.set({ ...bounded({ zoom: fitting(), x: size.width / 2, y: size.height / 2 }), fitted: true });
  }

  function move(across, down) {
    const { x, y, zoom } = view.get();
    view.set(bounded({ zoom, x: x + across / zoom, y: y + down / zoom }));
  }

  function middles() {
    const row = canvas.height / 2, width = canvas.width;
    return halves() === 2 ? [[width / 4, row], [(3 * width) / 4, row]] : [[width / 2, row]];
  }

  function middleOf(place) {
    const all = middles();
    return all.length === 2 && place[0] > canvas.width / 2 ? all[1] : all[0];
  }

  // Where on the canvas the picture begins and ends, from left to right.
  function visibleSpan() {
    const { x, zoom } = view.get();
    return [Math.max(0, canvas.width / 2 - x * zoom), Math.min(canvas.width, canvas.width / 2 + (size.width - x) * zoom)];
  }

  // Where the edge between source and result is, kept on the picture.
  function edge() {
    const [left, right] = visibleSpan();
    return left + view.get().cut * (right - left);
  }

  function cutAt(place) {
    const [left, right] = visibleSpan();
    view.set({ cut: Math.min(1, Math.max(0, (place - left) / (right - left || 1))) });
  }

  function draw() {
    const { mode, flipped, loupe, ...at } = view.get();
    const { width, height } = canvas;
    context.clearRect(0, 0, width, height);
    Object.values(layers).forEach((layer) => layer.dropQueued());
    const paint = (name, box, middle) => drawLayer(context, layers[name], size, { ...at, middle }, box);
    const whole = { left: 0, top: 0, width, height };
    if (mode === "sides") {
      const half = Math.floor(width / 2);
      paint("before", { ...whole, width: half - ratio() }, middles()[0]);
      paint("after", { ...whole, left: half + ratio(), width: width - half - ratio() }, middles()[1]);
    } else if (mode === "slider") {
      const cut = Math.round(edge());
      paint("before", { ...whole, width: cut }, middles()[0]);
      paint("after", { ...whole, left: cut, width: width - cut }, middles()[0]);
      context.fillStyle = "#000";
      context.fillRect(cut - 2 * ratio(), 0, 4 * ratio(), height);
      context.fillStyle = "#fff";
      context.fillRect(cut - ratio(), 0, 2 * ratio(), height);
    } else paint(mode === "flip" && flipped ? "before" : "after", whole, middles()[0]);
    if (loupe) drawLoupe(loupe);
    describe();
  }

  // A round glass above the finger: what is under it at four pixels and more, the source on the left.
  function drawLoupe(place) {
    const radius = LOUPE_RADIUS * ratio(), { x, y, zoom } = view.get(), from = middleOf(place);
    const middle = [place[0], Math.max(radius, place[1] - 1.4 * radius)];
    const at = { zoom: Math.max(4, 3 * zoom), x: x + (place[0] - from[0]) / zoom, y: y + (place[1] - from[1]) / zoom, middle };
    const box = { left: middle[0] - radius, top: middle[1] - radius, width: 2 * radius, height: 2 * radius };
    context.save();
    context.beginPath();
    context.arc(...middle, radius, 0, 2 * Math.PI);
    context.clip();
    context.fillStyle = "#888";
    context.fillRect(box.left, box.top, box.width, box.height);
    if (layers.before) drawLayer(context, layers.before, size, at, { ...box, width: radius });
    drawLayer(context, layers.after, size, at, layers.before ? { ...box, left: middle[0], width: radius } : box);
    context.restore();
    context.strokeStyle = "#fff";
    context.lineWidth = 3 * ratio();
    context.beginPath();
    context.arc(...middle, radius, 0, 2 * Math.PI);
    context.stroke();
  }

  // What a person reads, and what can be read from outside.
  function describe() {
    const { zoom, mode, flipped, x, y, cut, loupe } = view.get();
    percent.textContent = `${Math.round(100 * zoom)} %`;
    Object.assign(figure.dataset, { zoom, mode, x, y, cut, loupe: Boolean(loupe), shows: flipped ? "before" : "after",
      pending: Object.values(layers).reduce((sum, layer) => sum + layer.pending(), 0) });
    const shown = { slider: [true, true], sides: [true, true], flip: [flipped, !flipped], after: [false, false] }[mode];
    tags.forEach((tag, number) => (tag.hidden = !shown[number]));
    slider.hidden = mode !== "slider";
    if (document.activeElement !== slider) slider.value = 100 * cut;
    for (const button of modes.children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }

  const makeButton = (text, title, action, data = {}) => {
    const button = element("button", { type: "button", textContent: text, title });
    Object.assign(button.dataset, data);
    button.addEventListener("click", action);
    return button;
  };
  const percent = element("output", { className: "soft", "aria-label": "Zoom" });
  const setMode = (mode) => {
    const { flipped, fitted, mode: now } = view.get();
    view.set({ mode, flipped: mode === "flip" && now === "flip" ? !flipped : mode === "flip" });
    if (fitted) fit();
    else view.set(bounded(view.get()));
  };
  const zooms = element("div", { className: "row", role: "group", "aria-label": "Zoom" },
    makeButton("Fit", "All of it, at most at its own size (0)", fit),
    makeButton("1:1", "One pixel of the screen for each of the picture (1)", () => zoomTo(1)),
    makeButton("400 %", "Single pixels (4)", () => zoomTo(4)),
    makeButton("−", "Smaller (−)", () => zoomTo(view.get().zoom / 1.5)),
    makeButton("+", "Larger (+)", () => zoomTo(view.get().zoom * 1.5)),
    percent);
  const modes = element("div", { className: "row", role: "group", "aria-label": "Compare", hidden: !before },
    makeButton("Slider", "Source and result with an edge between them (c)", () => setMode("slider"), { mode: "slider" }),
    makeButton("Side by side", "(s)", () => setMode("sides"), { mode: "sides" }),
    makeButton("Flip", "One or the other (f)", () => setMode("flip"), { mode: "flip" }));
  const slider = element("input", { type: "range", min: 0, max: 100, step: "any", value: 50,
    "aria-label": "Where the source ends and the result begins", hidden: !before });
  slider.addEventListener("input", () => view.set({ cut: slider.value / 100 }));
  figure.append(slider, element("div", { className: "row tools" }, zooms, modes, ...more));

  const KEYS = {
    ArrowLeft: () => move(-STEP * ratio(), 0), ArrowRight: () => move(STEP * ratio(), 0),
    ArrowUp: () => move(0, -STEP * ratio()), ArrowDown: () => move(0, STEP * ratio()),
    "+": () => zoomTo(view.get().zoom * 1.5), "=": () => zoomTo(view.get().zoom * 1.5),
    "-": () => zoomTo(view.get().zoom / 1.5),
    0: fit, 1: () => zoomTo(1), 4: () => zoomTo(4),
    f: () => before && setMode("flip"), s: () => before && setMode("sides"), c: () => before && setMode("slider"),
  };
  stage.addEventListener("keydown", (event) => {
    const action = KEYS[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
  // A pinch on a touchpad comes as a wheel with the control key.
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    const speed = event.ctrlKey ? 0.01 : event.deltaMode === 1 ? 0.05 : 0.0015;
    zoomTo(view.get().zoom * Math.exp(-event.deltaY * speed), placeOf(event));
  }, { passive: false });

  const fingers = new Map();
  let gesture = null, timer = 0;
  function placeOf(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * ratio(), (event.clientY - box.top) * ratio()];
  }
  const apart = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]);
  const between = ([a, b]) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    stage.setPointerCapture(event.pointerId);
    const place = placeOf(event);
    fingers.set(event.pointerId, place);
    clearTimeout(timer);
    if (fingers.size > 1) {
      gesture = "pinch";
      view.set({ loupe: null });
      return;
    }
    const { mode, zoom } = view.get();
    const all = zoom * size.width <= canvas.width && zoom * size.height <= canvas.height;
    gesture = mode === "slider" && (all || Math.abs(place[0] - edge()) < GRAB * ratio()) ? "edge" : "picture";
    if (event.pointerType === "touch") {
      timer = setTimeout(() => {
        gesture = "loupe";
        view.set({ loupe: fingers.get(event.pointerId) });
      }, LOUPE_AFTER_MS);
    } else if (gesture === "edge") cutAt(place[0]);
  });
  stage.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    const place = placeOf(event), others = [...fingers].filter(([id]) => id !== event.pointerId);
    if (gesture !== "loupe" && Math.hypot(place[0] - last[0], place[1] - last[1]) > 3 * ratio()) clearTimeout(timer);
    fingers.set(event.pointerId, place);
    if (gesture === "loupe") view.set({ loupe: place });
    else if (gesture === "edge") cutAt(place[0]);
    else if (gesture === "picture") move(last[0] - place[0], last[1] - place[1]);
    else if (gesture === "pinch" && others.length) {
      const [[, other]] = others, now = between([place, other]), past = between([last, other]);
      move(past[0] - now[0], past[1] - now[1]);
      zoomTo((view.get().zoom * apart([place, other])) / Math.max(1, apart([last, other])), now);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    stage.addEventListener(end, (event) => {
      clearTimeout(timer);
      fingers.delete(event.pointerId);
      gesture = fingers.size ? gesture : null;
      if (!fingers.size) view.set({ loupe: null });
    });
  }
  stage.addEventListener("contextmenu", (event) => gesture && event.preventDefault());

  const sizes = new ResizeObserver(([entry]) => {
    const { width, height } = entry.contentRect, { fitted } = view.get();
    canvas.width = Math.max(1, Math.round(width * ratio()));
    canvas.height = Math.max(1, Math.round(height * ratio()));
    if (fitted) fit();
    else view.set(bounded(view.get()));
  });
  // In the shape of the picture, and not higher than it is at its own size.
  canvas.style.aspectRatio = `${size.width} / ${size.height}`;
  canvas.style.maxHeight = `min(70vh, max(14rem, ${Math.ceil(size.height / ratio())}px))`;
  sizes.observe(canvas);
  view.watch(schedule);
  return {
    element: figure,
    manifest: after,
    before,
    close() {
      sizes.disconnect();
      cancelAnimationFrame(drawing);
      Object.values(layers).forEach((layer) => layer.close());
    },
  };
}
