"use strict";
// What every part of the page uses: the data, numbers as text, colours, and elements made without markup.

const DATA = JSON.parse(document.getElementById("data").textContent);

const READ = {
  Float32Array: (view, at) => view.getFloat32(at, true),
  Int32Array: (view, at) => view.getInt32(at, true),
  Int8Array: (view, at) => view.getInt8(at),
};

function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = Type.BYTES_PER_ELEMENT;
  return Type.from({ length: bytes.length / size }, (_, place) => READ[Type.name](view, size * place));
}

function unpackAll(texts, Type) {
  for (const name of Object.keys(texts)) texts[name] = unpack(texts[name], Type);
}

unpackAll(DATA.shared, Float32Array);
for (const block of DATA.blocks) {
  unpackAll(block.values, Float32Array);
  unpackAll(block.marks || {}, Int8Array);
  for (const arrays of Object.values(block.effects)) for (const name of Object.keys(arrays))
    arrays[name] = unpack(arrays[name], name === "found" || name === "family" ? Int8Array : Float32Array);
  block.pairs = block.pairs && unpack(block.pairs, Int32Array);
  block.at = (layer, head) => layer * block.heads.length + head;
  block.value = (name, place) => (block.values[name] ? block.values[name][place] : NaN);
  block.finding = (place) => (block.marks && DATA.findings[block.marks.found[place] - 1]) || null;
}

/** An element with attributes, and children that are elements or plain text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** Four significant digits; a minus that lines up; a dash for what is not there. */
function show(number) {
  if (number === null || Number.isNaN(number)) return "–";
  const size = Math.abs(number);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? number.toExponential(2) : String(Number(number.toPrecision(4)));
  return text.replace("-", "−");
}

const fixed = (number) => number.toFixed(1);

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

// Cividis, and blue to orange about a neutral middle. Both are safe for colour-blind readers.
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const DIVERGING = {
  light: ["#0b3c74", "#2f6fb1", "#86b6de", "#f3f3f1", "#f2b877", "#cc7318", "#743a02"],
  dark: ["#a9d3fb", "#4f92d3", "#24507f", "#2a2d33", "#7d4d16", "#dd8a2c", "#ffd39a"],
};

function parse(color) {
  return [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
}

/** The colour at a share of a list of colours, as [red, green, blue]. */
function mix(colors, share) {
  const at = Math.min(Math.max(share, 0), 1) * (colors.length - 1);
  const [low, high] = [parse(colors[Math.floor(at)]), parse(colors[Math.ceil(at)])];
  return low.map((part, i) => Math.round(part + (high[i] - part) * (at % 1)));
}

const rgb = (parts) => `rgb(${parts.join(" ")})`;

function extent(arrays) {
  let [low, high] = [Infinity, -Infinity];
  for (const array of arrays)
    for (const number of array) {
      if (number < low) low = number;
      if (number > high) high = number;
    }
  return low > high ? [0, 1] : [low, high];
}

/** Round numbers between two ends, about as many as asked for. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

const DRAW = [];
const redraw = () => DRAW.forEach((draw) => draw());

/** A group of radio buttons that looks like one switch; several groups may set the same part of the state. */
function segments(title, name, choices, state = name) {
  const labels = Object.entries(choices).map(([key, { label, there = true }]) =>
    make("label", {}, make("input", {
      type: "radio", name, value: key, "data-state": state, checked: STATE[state] === key, disabled: !there,
      onchange: () => { STATE[state] = key; redraw(); },
    }), label));
  return make("fieldset", {}, make("legend", {}, title), make("div", { class: "segments" }, ...labels));
}

DRAW.push(() => {
  for (const input of document.querySelectorAll("input[data-state]")) input.checked = input.value === STATE[input.dataset.state];
});
