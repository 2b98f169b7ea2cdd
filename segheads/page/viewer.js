// Draws an image, its labels and its uncertainty. Nothing here asks the model: opacity, legend and view are the
// browser's own. Names of classes become text nodes, never HTML.
const find = (words) => element.querySelector(words);
const [message, hint, main, stage, picture, canvas, cross, tip, read, legend, count, search, scale] = [
  ".message", ".hint", ".main", ".stage", ".stage img", "canvas", ".cross", ".tip", ".read", ".legend", ".count",
  "input[type=search]", ".scale",
].map(find);
const [shows, opacity] = [find("select"), find(".opacity input")];
const STOPS = [[0, 32, 77], [124, 123, 120], [255, 234, 70]]; // cividis, as in the style's .scale
const hidden = new Set(); // labels
let view = null; // what the server sent, with labels and maps as arrays
let at = null; // the pixel that the keyboard is at
let latest = 0;

async function unpacked(text, bytes) {
  const raw = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer);
}

async function show(sent) {
  const mine = ++latest;
  message.hidden = !sent?.error;
  message.textContent = sent?.error ?? "";
  if (!sent?.image) return; // what was shown stays
  const labels = await unpacked(sent.labels, sent.bytes);
  const maps = await Promise.all(sent.maps.map(async (map) => ({ ...map, values: await unpacked(map.values, 1) })));
  const loaded = Object.assign(new Image(), { src: sent.image });
  await loaded.decode();
  if (mine !== latest) return; // a later one came first
  picture.src = sent.image;
  stage.style.setProperty("--ratio", sent.shown[0] / sent.shown[1]);
  const isOther = view?.image !== sent.image;
  view = { ...sent, labels, maps, entries: new Map(sent.classes.map((entry) => [entry.label, entry])) };
  picture.alt = sent.name;
  hint.hidden = true;
  main.hidden = false;
  [canvas.width, canvas.height] = sent.shown;
  offerMaps();
  list();
  draw();
  if (isOther) {
    at = null;
    stage.scrollIntoView({ block: "nearest" }); // in a narrow window it is below the settings
  }
  tell(at, false);
}

function offerMaps() {
  const options = [["classes", "Classes"], ...view.maps.map((map) => [map.name, map.title])];
  const before = shows.value;
  shows.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  shows.value = options.some(([value]) => value === before) ? before : "classes";
}

const mapShown = () => view.maps.find((map) => map.name === shows.value);

function draw() {
  const map = mapShown();
  const colours = new Uint8ClampedArray(4 * (map ? 256 : 65536));
  if (map) {
    for (let value = 0; value < 256; value++) colours.set([...heat(value / 255), 255], 4 * value);
  } else {
    for (const { label, colour } of view.classes) {
      if (!hidden.has(label) && label !== view.background) colours.set([...colour, 255], 4 * label);
    }
  }
  const values = map ? map.values : view.labels;
  const table = new Uint32Array(colours.buffer);
  const pixels = new ImageData(...view.shown);
  const out = new Uint32Array(pixels.data.buffer);
  for (let k = 0; k < out.length; k++) out[k] = table[values[k]];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  canvas.style.opacity = opacity.value / 100;
  scale.hidden = !map;
  if (map) find(".most").textContent = `${map.most.toFixed(2)} nats`;
}

function heat(share) {
  const place = 2 * Math.min(share, 0.9999);
  const [low, high] = [STOPS[Math.floor(place)], STOPS[Math.floor(place) + 1]];
  return low.map((value, k) => value + (high[k] - value) * (place % 1));
}

function list() {
  legend.replaceChildren(...view.classes.map(({ label, name, colour, share }) => {
    const [item, button, swatch, title, part] = ["li", "button", "i", "b", "em"].map((tag) => document.createElement(tag));
    swatch.style.background = `rgb(${colour.join()})`;
    title.textContent = button.title = name;
    part.textContent = percent(share);
    button.type = "button";
    button.dataset.label = label;
    button.append(swatch, title, part);
    button.onclick = () => toggle([label], hidden.has(label));
    item.append(button);
    return item;
  }));
  mark();
}

function toggle(labels, visible) {
  for (const label of labels) visible ? hidden.delete(label) : hidden.add(label);
  mark();
  draw();
}

function mark() {
  const words = search.value.trim().toLowerCase();
  let matching = 0;
  for (const item of legend.children) {
    const button = item.firstChild;
    button.setAttribute("aria-pressed", !hidden.has(Number(button.dataset.label)));
    item.hidden = !button.title.toLowerCase().includes(words);
    matching += !item.hidden;
  }
  count.textContent = `${words ? `${matching} of ` : ""}${view.classes.length} classes in this image`;
}

const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const offered = () => [...legend.children].filter((item) => !item.hidden).map((item) => Number(item.firstChild.dataset.label));

function wordsAt([x, y]) {
  const place = y * view.shown[0] + x;
  const entry = view.entries.get(view.labels[place]);
  const map = mapShown();
  const value = map ? `, ${((map.values[place] / 255) * map.most).toFixed(2)} nats` : "";
  return `${entry.name}, ${percent(entry.share)}${value}`;
}

function tell(pixel, withTip) {
  tip.hidden = !(pixel && withTip);
  cross.hidden = !(at && document.activeElement === stage);
  if (!pixel) return void (read.textContent = "");
  const words = wordsAt(pixel);
  const [x, y] = pixel.map((value, k) => (value + 0.5) / view.shown[k]);
  read.textContent = `${words} (x ${Math.floor(x * view.size[0])}, y ${Math.floor(y * view.size[1])})`;
  tip.textContent = words;
  tip.style.left = tip.style.right = tip.style.top = tip.style.bottom = "auto";
  if (x < 0.6) tip.style.left = `calc(${100 * x}% + 12px)`;
  else tip.style.right = `calc(${100 * (1 - x)}% + 12px)`;
  if (y < 0.7) tip.style.top = `calc(${100 * y}% + 12px)`;
  else tip.style.bottom = `calc(${100 * (1 - y)}% + 12px)`;
  cross.style.left = `${100 * x}%`;
  cross.style.top = `${100 * y}%`;
}

stage.addEventListener("pointermove", (event) => {
  const box = stage.getBoundingClientRect();
  const shares = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  at = null;
  tell(shares.map((share, k) => Math.max(0, Math.min(view.shown[k] - 1, Math.floor(share * view.shown[k])))), true);
});
stage.addEventListener("pointerleave", () => tell(at, false));
stage.addEventListener("blur", () => tell(null, false));
stage.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const far = event.shiftKey ? 1 : Math.max(1, Math.round(view.shown[0] / 50));
  at ??= view.shown.map((side) => side >> 1);
  at = at.map((value, k) => Math.max(0, Math.min(view.shown[k] - 1, value + far * step[k])));
  tell(at, true);
});
opacity.addEventListener("input", () => {
  find(".opacity output").textContent = `${opacity.value} %`;
  canvas.style.opacity = opacity.value / 100;
});
shows.addEventListener("change", draw);
search.addEventListener("input", mark);
find(".all").addEventListener("click", () => toggle(offered(), true));
find(".none").addEventListener("click", () => toggle(offered(), false));
for (const button of element.querySelectorAll(".save")) {
  button.addEventListener("click", () =>
    trigger("save", { kind: button.dataset.kind, opacity: opacity.value / 100, hidden: [...hidden] }));
}
watch("value", () => show(props.value));
show(props.value);
