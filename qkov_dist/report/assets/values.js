// What the heatmaps of two tasks can show, and what is chosen of it at first.

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

/** What Enter does at a head of a heatmap. */
const ENTER_SAYS = "Enter lists the strongest pairs of a head";
