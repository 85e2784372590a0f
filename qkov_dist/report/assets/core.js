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

const isSigned = DATA.may_be_negative;
const hasStatistic = DATA.blocks.some((block) => block.values.stat);
const isTested = DATA.statistic !== null;
const hasEffects = DATA.effects !== null;

/** What can be shown: its name, where it lies, its interval, and what it means. */
const VALUES = {
  ...(hasEffects ? effectValues() : {}),
  score: {
    label: hasEffects ? DATA.score : "score", title: `mean ${DATA.score}`, key: "score", low: "score_low", high: "score_high", null: "score_null", centred: isSigned,
    there: true,
    hint: `Mean ${DATA.score} over all pairs of one sample of ${DATA.tasks[0]} and one of ${DATA.tasks[1]}. It grows with the loss ` +
      "and with the size of a head's slice: compare heads within one block, not blocks with each other." +
      (isSigned ? " Below 0 the tasks' gradients conflict, above 0 they agree." : ""),
  },
  overlap: {
    label: "overlap", title: "overlap", key: "stat", low: "stat_low", high: "stat_high", null: "stat_null", centred: true, there: hasStatistic,
    hint: "Whether the tasks use the same weights, whatever the scale of their gradients. Very negative: both use the head, each with " +
      "weights of its own. Under exchanged labels it lies above 0, the more so the more samples' norms vary: marks and effect compare " +
      "with that null, not with 0.",
  },
  effect: {
    label: hasEffects ? "effect size" : "effect", title: "effect size", key: "effect", low: "effect_low", high: "effect_high", centred: true, there: isTested,
    hint: `Distance of ${DATA.statistic} from its mean under exchanged task labels, in standard deviations (Cohen's d). Its sign is the side of the null.`,
  },
  q: {
    label: hasEffects && isTested ? `q of ${DATA.statistic}` : "q", title: "q", key: "q", there: isTested,
    hint: `Benjamini-Hochberg q-value of ${DATA.statistic} within a block${DATA.sided ? `, ${DATA.sided}` : ""}: the smaller, the stronger the colour. ` +
      "Orange lies above the null, blue below it." +
      (DATA.sided?.startsWith("one-sided") ? " Heads on the other side were not looked for: there q is near 1 whatever they do." : ""),
  },
  share: {
    label: "share", title: `Fisher share of ${DATA.tasks[0]}`, key: "share", there: DATA.blocks.some((block) => block.values.share), ends: [0, 1],
    hint: `Share of the Fisher I that comes from samples of ${DATA.tasks[0]}; the rest is ${DATA.tasks[1]}'s. Near 0 or 1 one task is loud: ` +
      "mean scores depend on that, overlap does not depend on the scale of the tasks' gradients, given the Fisher.",
  },
};

/** Marks on nearly every cell would hide the colours: they are off at first. */
const numMarked = DATA.findings.reduce((sum, { number }) => sum + (number || 0), 0);
const numHeads = DATA.blocks.reduce((sum, block) => sum + block.values.score.filter((score) => !Number.isNaN(score)).length, 0);
const hidesMarks = numMarked > 0.8 * numHeads;

const STATE = {
  value: hasEffects ? "change" : "score", optimizer: "adam", harmed: "a", step: DATA.effects?.step, effectMarks: "all",
  effectRange: "shared", scale: "linear", range: "block", marks: hidesMarks ? "none" : "all", selected: null,
};
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
