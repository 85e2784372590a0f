// The numbers of one head, beside the pointer and below the heatmaps.

/** Names and numbers of one head, in reading order. */
const numbersOf = (block, at) => [...(hasEffects ? effectNumbers(block, at) : []), ...testNumbers(block, at)];

/** The first of them: as many as fit beside the pointer. */
function numbersAtPointer(block, at) {
  return hasEffects && showsEffect() ? [...effectNumbers(block, at), ...testNumbers(block, at).slice(0, 4)] : numbersOf(block, at);
}

function testNumbers(block, at) {
  const interval = (low, high) => {
    const [from, to] = [block.value(low, at), block.value(high, at)];
    return Number.isNaN(from) ? "" : ` [${show(from)}, ${show(to)}]`;
  };
  const withNull = ({ title, key, low, high, null: name }) => {
    rows.push([title, show(block.value(key, at)) + interval(low, high)]);
    const mean = block.value(name, at);
    if (!Number.isNaN(mean)) rows.push([`its null`, show(mean) + interval(`${name}_low`, `${name}_high`)]);
  };
  const rows = [];
  withNull(VALUES.score);
  if (hasStatistic) withNull(VALUES.overlap);
  if (isTested) {
    rows.push(["effect size", show(block.value("effect", at)) + interval("effect_low", "effect_high")], ["p", show(block.value("p", at))]);
    rows.push(["q", show(block.value("q", at))], ["family-wise p", show(block.value("p_max", at))]);
    rows.push(["finding", findingText(block.finding(at))]);
  }
  if (block.values.share) rows.push([VALUES.share.title, show(block.value("share", at))]);
  rows.push(["ridge share", show(block.value("ridge", at))]);
  return rows;
}
