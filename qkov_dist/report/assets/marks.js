// What a head shows, as a mark: shapes on canvases and in charts. Which head shows what is decided before the page is made.

// Light inside and dark at the edge, so that a mark is seen on any colour of a heatmap.
const MARK_FILLS = { above: "#ff8f52", below: "#7cc6ff", null: "#c9ced6" };
const MARK_EDGES = { above: "#571800", below: "#062a52", null: "#1c1f24" };
const CORNERS = {
  up: [[0, -1], [1, 0.8], [-1, 0.8]],
  down: [[0, 1], [1, -0.8], [-1, -0.8]],
  square: [[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]],
  diamond: [[0, -1.1], [1, 0], [0, 1.1], [-1, 0]],
  dot: [0, 1, 2, 3, 4, 5, 6, 7].map((n) => [Math.cos((n * Math.PI) / 4), Math.sin((n * Math.PI) / 4)]),
};

/** Corners of a mark about a point. */
function cornersOf(mark, x, y, radius) {
  return CORNERS[mark].map(([right, down]) => [x + radius * right, y + radius * down]);
}

/** Which marks belong to what is shown: of effects, or of the tests of scores. */
const showsEffect = () => Boolean(VALUES[STATE.value].isEffect);
const findingsShown = () => (showsEffect() ? DATA.effects.findings : DATA.findings);

/** Every marked head of a block: its place, what it shows, and whether that holds over all heads. */
function* marksOf(block) {
  const marks = showsEffect() ? block.effects[STATE.optimizer] : block.marks;
  const chosen = showsEffect() ? STATE.effectMarks : STATE.marks;
  if (!marks || chosen === "none") return;
  for (let at = 0; at < marks.found.length; at++) {
    const finding = findingsShown()[marks.found[at] - 1];
    if (finding && (chosen === "all" || chosen === finding.name)) yield { at, finding, isFamily: marks.family[at] === 1 };
  }
}

/** Middle and radius of a cell's mark; the middle is that of a pixel, so that small marks keep their shape. */
function markPlace(map, layer, head) {
  const [left, top, width, height] = boxOf(map, layer, head);
  const radius = Math.min(Math.max(Math.min(width, height) * 0.3, 2), 4.4);
  return [Math.floor(left + width / 2) + 0.5, Math.floor(top + height / 2) + 0.5, radius];
}

function drawMarks(context, map) {
  const heads = map.block.heads.length;
  context.lineJoin = "round";
  for (const { at, finding, isFamily } of marksOf(map.block)) {
    const [x, y, radius] = markPlace(map, Math.floor(at / heads), at % heads);
    context.lineWidth = radius < 2.5 ? 0.7 : 1;
    context.fillStyle = isFamily ? MARK_FILLS[finding.side] : "#ffffff";
    context.strokeStyle = MARK_EDGES[finding.side];
    context.beginPath();
    cornersOf(finding.mark, x, y, radius).forEach((corner) => context.lineTo(...corner));
    context.closePath();
    context.fill();
    context.stroke();
  }
}

/** A finding in words, with its mark. */
const findingText = (finding) => (finding ? `${finding.glyph} ${finding.name}` : "none");

/** The choices of the switch of marks of effects. */
const effectMarkChoices = () => Object.fromEntries([
  ["all", { label: "all" }],
  ...DATA.effects.findings.map(({ name, glyph }) => [name, { label: `${glyph}\u00a0${name}` }]),
  ["none", { label: "none" }],
]);

/** The choices of the switch of marks of tests. */
const markChoices = () => Object.fromEntries([
  ["all", { label: "all", there: isTested }],
  ...DATA.findings.filter(({ number }) => number !== null)
    .map(({ name, glyph, number }) => [name, { label: `${glyph}\u00a0${name}`, there: number > 0 }]),
  ["none", { label: "none", there: isTested }],
]);
