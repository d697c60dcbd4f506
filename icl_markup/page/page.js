// The page: sentences in, probabilities and prompts out, labels and examples edited.

import { ask, element, Refused, useKey } from "./api.js";

const SHOWN = 6; // labels a sentence, until all are asked for
const KINDS = {
  tag: "tag: soft tokens",
  symbol: "option symbol",
  value: "label or sentence",
  slot: "slot: the answer is read here",
  text: "words of the template",
  special: "the tokenizer's own",
};

const at = (id) => document.getElementById(id);
const lines = (id) => at(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

let classified = []; // the sentences whose answers are shown
let prompted = null; // the sentence whose prompt is shown
let edited = null; // the label whose examples are in the form
let shown = null; // the form's examples as they were written into it, and what they stand for
let again = null; // what is tried once more with a key

/** Run what asks the server, one at a time for a button; show what goes wrong. */
async function attempt(action, button) {
  at("problem").hidden = true;
  if (button) button.disabled = true;
  at("working").textContent = "working …";
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) {
      again = action;
      at("key").hidden = false;
      at("key-field").focus();
    }
    at("problem").firstElementChild.textContent = error.message;
    at("problem").hidden = false;
  } finally {
    at("working").textContent = "";
    if (button) button.disabled = false;
  }
}

async function showState() {
  const health = await ask("GET", "/healthz");
  at("state").textContent = `${health.labels} labels · ${health.backbone}`;
}

// Labels and examples

async function showLabels() {
  const { intents } = await ask("GET", "/intents");
  at("labels").replaceChildren(...intents.map(row));
  await showState();
}

function row(intent) {
  const examples = intent.examples.length
    ? element("ul", {}, ...intent.examples.map((text) => element("li", {}, text)))
    : element("span", { class: "hint" }, "none: known by its name");
  const head = element("th", { scope: "row" }, intent.label);
  if (intent.description) head.append(element("div", { class: "hint" }, intent.description));
  const edit = element("button", { type: "button", class: "quiet small", "aria-label": `Edit ${intent.label}` }, "Edit");
  const remove = element(
    "button",
    { type: "button", class: "quiet small", "aria-label": `Remove ${intent.label}` },
    "Remove",
  );
  edit.addEventListener("click", () => startEdit(intent));
  remove.addEventListener("click", () =>
    attempt(async () => {
      await ask("DELETE", `/intents?label=${encodeURIComponent(intent.label)}`);
      if (edited === intent.label) endEdit();
      await changed();
      at("label").focus();
    }, remove),
  );
  const line = element("tr", {}, head, element("td", {}, examples), element("td", { class: "changes" }, edit, remove));
  line.classList.toggle("edited", edited === intent.label);
  line.dataset.label = intent.label;
  return line;
}

function markEdited(label) {
  edited = label;
  for (const line of at("labels").children) line.classList.toggle("edited", line.dataset.label === label);
}

/** Write examples one a line, with a mark for the line breaks inside them that is no part of any. */
function shownExamples(examples) {
  const mark = [..."⏎↵␤¶"].find((one) => !examples.some((text) => text.includes(one))) ?? "⏎";
  const written = examples.map((text) => text.replaceAll(/\r\n|\r|\n/g, mark));
  const hasBreaks = written.some((text, i) => text !== examples[i]);
  const originals = new Map(written.map((text, i) => [text.trim(), examples[i]]));
  return { value: written.join("\n"), mark, hasBreaks, originals };
}

/** Read the form's examples: a line that was not touched is the example that it stands for, to the character. */
function typedExamples() {
  const typed = lines("examples");
  if (!shown) return typed;
  const broken = (line) => (shown.hasBreaks ? line.replaceAll(shown.mark, "\n") : line);
  return typed.map((line) => shown.originals.get(line) ?? broken(line));
}

function startEdit(intent) {
  markEdited(intent.label);
  at("label").value = intent.label;
  at("label").readOnly = true;
  at("description").value = intent.description;
  shown = shownExamples(intent.examples);
  at("examples").value = shown.value;
  at("break-mark").textContent = shown.mark;
  at("breaks").hidden = !shown.hasBreaks;
  at("add-heading").textContent = "Edit a label";
  at("add-button").textContent = "Save";
  at("cancel").hidden = false;
  at("examples").focus();
}

function endEdit() {
  markEdited(null);
  shown = null;
  at("breaks").hidden = true;
  at("add").reset();
  at("label").readOnly = false;
  at("add-heading").textContent = "Add a label";
  at("add-button").textContent = "Add";
  at("cancel").hidden = true;
}

async function changed() {
  await showLabels();
  if (classified.length) await showAnswers(classified);
}

at("add").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    const body = { label: at("label").value };
    const description = at("description").value.trim();
    if (description || edited !== null) body.description = description;
    // Examples that are as they were are not sent: adding none to a label leaves it those that it has.
    const isSame = shown !== null && at("examples").value === shown.value;
    if (!isSame) body.examples = typedExamples();
    await ask(edited === null || isSame ? "POST" : "PUT", "/intents", body);
    endEdit();
    await changed();
    at("label").focus();
  }, at("add-button"));
});
at("cancel").addEventListener("click", () => {
  endEdit();
  at("label").focus();
});

// Answers

async function showAnswers(texts) {
  const { answers } = await ask("POST", "/classify", { texts });
  classified = texts;
  at("answers").replaceChildren(...answers.map((answer, i) => answerItem(texts[i], answer)));
  await showPrompt(texts.includes(prompted) ? prompted : texts[0]);
}

function answerItem(text, answer) {
  const order = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]);
  // The answer comes first, also where another label is as likely.
  order.sort((a, b) => (b[0] === answer.label) - (a[0] === answer.label));
  const bars = element("ul", { class: "bars", "aria-label": `Probabilities of ${text}` });
  const show = (count) => bars.replaceChildren(...order.slice(0, count).map((one) => bar(one, answer.label)));
  show(SHOWN);
  const prompt = element("button", { type: "button", class: "quiet small", "aria-label": `Show the prompt of ${text}` });
  prompt.append("Show the prompt");
  prompt.addEventListener("click", () =>
    attempt(async () => {
      await showPrompt(text);
      at("prompt").scrollIntoView({ block: "nearest" });
      at("prompt").focus();
    }, prompt),
  );
  const item = element("li", {}, element("p", { class: "asked" }, text), bars, prompt);
  if (order.length > SHOWN) {
    const all = element("button", { type: "button", class: "quiet small" }, `All ${order.length} labels`);
    all.addEventListener("click", () => {
      show(order.length);
      prompt.focus();
      all.remove();
    });
    item.append(" ", all);
  }
  return item;
}

function bar([label, probability], best) {
  const share = `${(100 * probability).toFixed(1)} %`;
  const fill = element("div", { class: "fill" });
  fill.style.width = `${100 * probability}%`;
  const meter = element("div", {
    class: "track",
    role: "meter",
    "aria-label": label,
    "aria-valuemin": "0",
    "aria-valuemax": "100",
    "aria-valuenow": (100 * probability).toFixed(1),
    "aria-valuetext": share,
  });
  meter.append(fill);
  const name = element("span", { class: "name", title: label }, label);
  return element("li", { class: label === best ? "best" : "" }, name, meter, element("span", { class: "share" }, share));
}

at("classify").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    const texts = lines("texts");
    if (!texts.length) throw new Refused(422, "type a sentence first");
    await showAnswers(texts);
  }, event.submitter ?? at("classify").querySelector("button"));
});
at("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("classify").requestSubmit();
});

// The prompt

async function showPrompt(text) {
  const found = await ask("POST", "/prompt", { text });
  prompted = text;
  const cut = found.shortened || found.dropped ? `, ${found.shortened} examples shortened, ${found.dropped} left out` : "";
  at("prompt-facts").textContent = `${found.tokens} tokens, ${found.options.length} options${cut}: “${text}”`;
  at("prompt").replaceChildren(...segments(found.pieces));
  const kinds = Object.keys(KINDS).filter((kind) => found.pieces.some((one) => one.kind === kind));
  at("legend").replaceChildren(
    ...kinds.map((kind) => element("li", {}, element("span", { class: `piece ${kind}` }, KINDS[kind]))),
    element("li", {}, element("span", { class: "piece value query" }, "the sentence that is asked about")),
  );
  at("legend").hidden = at("prompt").hidden = false;
}

/** Put the pieces of an option, of an example or of the query together, so that lines break between these. */
function segments(pieces) {
  const made = [];
  let last;
  for (const one of pieces) {
    if (!made.length || one.segment !== last) made.push(element("span", { class: "segment" }));
    made.at(-1).append(piece(one));
    last = one.segment;
  }
  return made;
}

function piece({ kind, text, tokens, segment }) {
  const about = `${KINDS[kind]}, ${tokens} ${tokens === 1 ? "token" : "tokens"}`;
  const made = element("span", { class: `piece ${kind}`, title: about }, text);
  if (kind === "value" && segment < 0) made.classList.add("query");
  return made;
}

// The rest

at("problem").lastElementChild.addEventListener("click", () => {
  at("problem").hidden = true;
});
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key-field").value);
  at("key").hidden = true;
  at("key-field").value = "";
  const action = again;
  again = null;
  attempt(async () => {
    await showLabels();
    if (action && action !== showLabels) await action();
  });
});

attempt(showLabels);
