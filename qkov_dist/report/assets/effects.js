// Effects of steps: what the heatmaps and charts show of them, for the optimizer, the harmed task and the step chosen.

const harmedTask = () => DATA.tasks[STATE.harmed === "a" ? 0 : 1];
const stepText = () => `a step on ${DATA.tasks[STATE.harmed === "a" ? 1 : 0]} does to ${DATA.tasks[STATE.harmed === "a" ? 0 : 1]}'s loss`;

function effectValues() {
  return {
    change: {
      label: "change", key: "change", low: "change_low", high: "change_high", null: "change_null", centred: true, isEffect: true,
      get title() { return `change (${STATE.optimizer})`; },
      get hint() {
        return `What a unit step of ${STATE.optimizer} (learning rate × number of steps = 1) on either task, in one head alone, does to the other ` +
          "task's loss, to first order: above 0 (orange) it raises it, below 0 (blue) it lowers it. Heads add up.";
      },
    },
    harm: {
      label: "harm at a step", key: "harm", centred: true, isEffect: true,
      get title() { return `harm at a step of ${STATE.step} (${STATE.optimizer})`; },
      get hint() {
        return `What ${stepText()}, at a step of ${STATE.step} (learning rate × number of steps) of ${STATE.optimizer}: ` +
          "step × change + step² × curvature. Above 0 (orange) is harm.";
      },
    },
    curvature: {
      label: "curvature", key: "curvature", isEffect: true, isLog: true,
      get title() { return `curvature (${STATE.optimizer})`; },
      get hint() { return `Second order of what ${stepText()}: the rise for a squared unit step of ${STATE.optimizer}, by the whole Fisher along the step. It decides where steps are large or the task is near its optimum.`; },
    },
  };
}

/** The arrays that go with the chosen optimizer, harmed task and step, where the rest of the page finds them. */
function prepareEffects() {
  for (const block of DATA.blocks) {
    const { change, width, [`curvature_${STATE.harmed}`]: curvature } = block.effects[STATE.optimizer];
    Object.assign(block.values, {
      change, curvature,
      change_low: change.map((number, at) => number - width[at]),
      change_high: change.map((number, at) => number + width[at]),
      change_null: change.map((number) => number * 0),
      change_null_low: width.map((number) => -number),
      change_null_high: width,
      harm: change.map((number, at) => STATE.step * number + STATE.step ** 2 * curvature[at]),
    });
  }
}

const effectFinding = (block, at) => DATA.effects.findings[block.effects[STATE.optimizer].found[at] - 1] || null;

/** The sum of all changes above 0: of which a head's harm is a share. */
function totalHarm() {
  return DATA.blocks.reduce((sum, block) => sum + block.values.change.reduce((part, number) => part + (number > 0 ? number : 0), 0), 0);
}

const percent = (share) => `${show(Number((100 * share).toPrecision(3)))} %`;

/** Names and numbers of one head's effect, in reading order. */
function effectNumbers(block, at) {
  const of = (name, optimizer = STATE.optimizer) => block.effects[optimizer][name][at];
  const interval = (optimizer) => {
    const [change, width] = [of("change", optimizer), of("width", optimizer)];
    return show(change) + (Number.isNaN(width) ? "" : ` [${show(change - width)}, ${show(change + width)}]`);
  };
  const other = STATE.optimizer === "adam" ? "sgd" : "adam";
  return [
    [VALUES.change.title, interval(STATE.optimizer)], [`change (${other})`, interval(other)],
    ["q of change", show(of("q"))], ["family-wise p of change", show(of("p_max"))],
    ["effect", findingText(effectFinding(block, at))],
    [`harm at ${STATE.step}`, show(block.value("harm", at))], ["curvature", show(block.value("curvature", at))],
  ];
}

const MOST_STEP = 1000;

/** What is to be said of a step that is too large for the first order of the stepped task itself. */
function stepWarning() {
  const stepped = STATE.harmed === "a" ? "b" : "a";
  const practical = DATA.effects.practical[STATE.optimizer][stepped];
  if (practical === null || STATE.step <= 10 * practical) return "";
  return `To first order a step above ${show(Number((10 * practical).toPrecision(2)))} takes more than all of ${DATA.tasks[stepped === "a" ? 0 : 1]}'s own loss: such numbers are no prediction.`;
}

/** The switches of effects; a new step is shown at once. */
function effectTools() {
  const step = make("input", {
    type: "text", inputmode: "decimal", id: "step", value: String(STATE.step), size: 9, autocomplete: "off", "aria-describedby": "step-said value-hint",
    oninput: () => {
      const number = Number(step.value);
      const isFine = step.value.trim() !== "" && number > 0 && number <= MOST_STEP;
      step.setAttribute("aria-invalid", String(!isFine));
      if (isFine) {
        Object.assign(STATE, { step: number, value: "harm" });
        redraw();
      } else said.textContent = `Not a step: type a number above 0, up to ${show(MOST_STEP)}, such as 1.4e-4 or 0.003. Shown is still ${STATE.step}.`;
    },
  });
  const said = make("small", { id: "step-said", role: "status" });
  DRAW.push(() => {
    if (step.getAttribute("aria-invalid") !== "true") said.textContent = stepWarning();
    for (const place of document.querySelectorAll(".step-of-command")) place.textContent = String(STATE.step);
  });
  return [
    segments("Optimizer", "optimizer", { adam: { label: "adam" }, sgd: { label: "sgd" } }),
    segments("Whose loss", "harmed", { a: { label: DATA.tasks[0] }, b: { label: DATA.tasks[1] } }),
    make("label", { class: "field" }, make("span", {}, "Step: learning rate × steps"), step, said),
  ];
}

if (hasEffects) DRAW.unshift(prepareEffects);
