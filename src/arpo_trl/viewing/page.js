"use strict";
// Shows the data of the page. Everything enters the document through textContent, so text is never markup.
const PAGE = 50, CLIP = 1500, OPEN_NODES = 150, SHOWN_CHILDREN = 50;
const SYMBOLS = { branch_probability: "α", entropy_weight: "β", branch_threshold: "τ", branches_per_fork: "Z" };
const STOPS = { eos: "answered", length: "cut off by the length limit", call_limit: "ended at the limit of calls" };
const $ = (id) => document.getElementById(id);
const index = JSON.parse($("index").textContent);
const blocks = new Map(), trees = new Map(), texts = new Map();
for (const block of document.querySelectorAll("script.tree")) blocks.set(block.dataset.key, block);
let found = [], at = 0, open = null, opened = {}, scale = 1;

function el(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}
function button(text, action) {
  const made = el("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}
const number = (value, digits = 3) => value === null || value === undefined ? "–" : value.toFixed(digits);
const signed = (value, digits = 3) => value === null || value === undefined ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const counted = (count, one, many = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
const meanOf = (values) => values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
const rewardsOf = (group) => group.rewards.filter((reward) => reward !== null);
const isWrong = (reward) => reward !== null && reward <= 0;
const outcomeClass = (reward) => reward === null ? "" : isWrong(reward) ? "bad" : "good";
const asText = (value) => typeof value === "string" ? value : JSON.stringify(value);
function treeOf(key) {
  if (!trees.has(key)) trees.set(key, JSON.parse(blocks.get(key).textContent));
  return trees.get(key);
}
function textOf(key) {
  if (!texts.has(key)) {
    const tree = treeOf(key), parts = [tree.prompt, ...tree.answers];
    for (const node of tree.nodes) parts.push(node.text ?? "", ...(node.calls || []).flatMap((call) => [call.text, ...Object.values(call.arguments).map(asText)]));
    texts.set(key, parts.join("\n").toLowerCase());
  }
  return texts.get(key);
}
// A prompt without the markers of its chat template, for the list.
const question = (prompt) => prompt.replace(/<\|[^|>]*\|>/g, " ").replace(/\b(user|assistant|system)\n/g, " ").trim().slice(-240);

// Curves ------------------------------------------------------------------------------------------------------------
const W = 380, H = 190, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 22;
function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function tickStep(low, high) {
  const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((by) => by * power).find((by) => by >= rough * 0.999);
}
function ticks(low, high) {
  const step = tickStep(low, high);
  const marks = [];
  for (let mark = Math.ceil(low / step - 1e-9) * step; mark <= high + step * 1e-9; mark += step) marks.push(+mark.toPrecision(10));
  return marks;
}
function chart(panel) {
  const lines = Object.entries(panel.lines), points = lines.flatMap(([, line]) => line);
  const spread = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  let [low, high] = spread(points.map((p) => p[1]));
  if (low > 0 && low < high * 0.7) low = 0;
  if (high - low < 1e-9) { high += 0.5; low -= low > 0.5 || low < 0 ? 0.5 : 0; }
  const by = tickStep(low, high);
  low = Math.floor(low / by + 1e-9) * by;
  high = Math.ceil(high / by - 1e-9) * by;
  const [first, last] = spread(points.map((p) => p[0]));
  const x = (step) => LEFT + (W - LEFT - RIGHT) * (step - first) / (last - first || 1);
  const y = (value) => H - BOTTOM - (H - TOP - BOTTOM) * (value - low) / (high - low);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": panel.title });
  for (const mark of ticks(low, high)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(mark), y2: y(mark) }));
    picture.append(svg("text", { x: LEFT - 5, y: y(mark) + 4, "text-anchor": "end" }, String(mark)));
  }
  for (const mark of ticks(first, last).filter(Number.isInteger)) {
    picture.append(svg("text", { x: x(mark), y: H - 6, "text-anchor": mark === last ? "end" : "middle" }, String(mark)));
  }
  const legend = el("div", "legend");
  const values = lines.map(([label, line], i) => {
    const colour = `var(--c${i % 8})`;
    picture.append(svg("polyline", { points: line.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" "), style: `stroke: ${colour}` }));
    if (line.length < 15) for (const p of line) picture.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 2.6, style: `fill: ${colour}` }));
    const mark = el("i"), value = el("b");
    mark.style.background = colour;
    legend.append(el("span", "", mark, label + " ", value));
    return value;
  });
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  const steps = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
  const stepAt = (event) => {
    const box = picture.getBoundingClientRect(), wanted = (event.clientX - box.left) * W / box.width;
    return steps.reduce((best, step) => Math.abs(x(step) - wanted) < Math.abs(x(best) - wanted) ? step : best);
  };
  const show = (step) => lines.forEach(([, line], i) => {
    const point = step === null ? line[line.length - 1] : line.find((p) => p[0] === step);
    values[i].textContent = point ? number(point[1], Math.abs(point[1]) < 10 ? 3 : 1) : "";
  });
  const unit = el("span", "note", ` ${panel.unit}`);
  picture.append(cursor);
  picture.addEventListener("pointermove", (event) => {
    const step = stepAt(event);
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.setAttribute("visibility", "visible");
    unit.textContent = ` ${panel.unit}, step ${step}`;
    show(step);
  });
  picture.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); unit.textContent = ` ${panel.unit}`; show(null); });
  picture.addEventListener("click", (event) => chooseStep(stepAt(event)));
  show(null);
  return el("figure", "", el("figcaption", "", panel.title, unit), picture, legend, panel.note ? el("div", "note", panel.note) : null);
}
function showCurves() {
  $("curves").replaceChildren(...index.panels.map(chart));
  if (index.trees_from !== null && index.panels.length) {
    $("curves").append(el("p", "note", `From step ${index.trees_from} on the curves cover the logged trees only: the log of a run is saved with its checkpoints.`));
  }
}
// A step of the log counts finished steps, a rollout the steps before it.
function chooseStep(step) {
  const steps = [...new Set(index.groups.map((group) => group.step))];
  if (!steps.length) return;
  $("step").value = String(steps.reduce((best, each) => Math.abs(each - step + 1) < Math.abs(best - step + 1) ? each : best));
  filter();
  $("groups").scrollIntoView({ block: "nearest" });
}

// Groups ------------------------------------------------------------------------------------------------------------
function showFacts() {
  const leaves = index.groups.reduce((sum, group) => sum + group.rewards.length, 0);
  $("name").textContent = index.name;
  // One scale for all trees, so that colours can be compared: up to the highest mean of a turn, but no less than 0.1.
  scale = index.groups.reduce((highest, group) => Math.max(highest, group.highest), 0.1);
  $("facts").textContent = `${counted(index.groups.length, "logged tree")}, ${counted(leaves, "leaf", "leaves")}` +
    (index.left_out ? `; ${counted(index.left_out, "older tree")} left out (--leaves)` : "");
}
function showSteps() {
  const chosen = $("step").value, kinds = new Set(index.groups.map((group) => group.kind));
  const options = [["", "all"], ...(kinds.size > 1 ? [["step", "training"], ["eval", "evaluation"]] : [])];
  for (const step of new Set(index.groups.map((group) => group.step))) options.push([String(step), String(step)]);
  $("step").replaceChildren(...options.map(([value, label]) => Object.assign(el("option", "", label), { value })));
  $("step").value = options.some(([value]) => value === chosen) ? chosen : "";
}
const ORDERS = {
  oldest: () => 0,
  newest: (a, b) => b.step - a.step || a.group - b.group,
  worst: (a, b) => (meanOf(rewardsOf(a)) ?? Infinity) - (meanOf(rewardsOf(b)) ?? Infinity),
  entropy: (a, b) => b.highest - a.highest,
};
function filter(keepPage) {
  const words = $("search").value.toLowerCase().trim(), step = $("step").value;
  const low = $("low").value === "" ? -Infinity : +$("low").value, high = $("high").value === "" ? Infinity : +$("high").value;
  const ranged = $("low").value !== "" || $("high").value !== "";
  found = index.groups.filter((group) => {
    if (step && step !== group.kind && step !== String(group.step)) return false;
    if ($("wrong").checked && !group.rewards.some(isWrong)) return false;
    if ($("branched").checked && !group.branches) return false;
    if ($("failed").checked && !group.failed) return false;
    const reward = meanOf(rewardsOf(group));
    if (ranged && (reward === null || reward < low || reward > high)) return false;
    return !words || textOf(group.key).includes(words);
  }).sort(ORDERS[$("order").value]);
  if (!keepPage) at = 0;
  showList();
}
function row(group) {
  const made = button("", () => show(group.key));
  made.className = "group";
  made.dataset.key = group.key;
  made.setAttribute("aria-current", String(group.key === open));
  const squares = el("div", "squares");
  for (const reward of group.rewards.slice(0, 64)) squares.append(el("i", outcomeClass(reward) || "none"));
  const reward = meanOf(rewardsOf(group));
  squares.append(el("span", "note", ` ${reward === null ? "no reward" : number(reward, 2)}`));
  const facts = [`step ${group.step}`, group.kind === "eval" ? "evaluation" : "", `group ${group.group}`,
    group.branches ? counted(group.branches, "branch", "branches") : "", group.failed ? `${group.failed} failed` : ""].filter(Boolean).join(" · ");
  made.append(el("div", "note", facts), el("div", "question", question(group.prompt)), squares);
  return made;
}
function showList() {
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  at = Math.min(at, pages - 1);
  $("found").textContent = `${counted(found.length, "group")}. A circle is a leaf with a reward above 0, a square one of 0 or less, a grey one has no reward.`;
  $("list").replaceChildren(...found.slice(at * PAGE, (at + 1) * PAGE).map(row));
  $("page").textContent = `page ${at + 1} of ${pages}`;
  $("previous").disabled = at === 0;
  $("next").disabled = at === pages - 1;
}

// Tree --------------------------------------------------------------------------------------------------------------
function colour(entropy) {
  const share = Math.min(1, Math.sqrt(entropy / scale));
  return `color-mix(in oklab, var(--cool), var(--hot) ${Math.round(share * 100)}%)`;
}
function cell(entropy) {
  const made = el("i");
  made.style.background = colour(entropy);
  made.title = `${number(entropy)} nats`;
  return made;
}
function longText(text) {
  const made = el("pre");
  if (text.length <= CLIP) made.textContent = text;
  else {
    const whole = button(`Show all ${text.length.toLocaleString("en")} characters`, () => made.replaceChildren(text));
    made.append(text.slice(0, CLIP) + "… ", whole);
  }
  return made;
}
function outcome(end, stop) {
  return [el("span", `strong ${outcomeClass(end.reward)}`, `reward ${end.reward === null ? "none" : number(end.reward, 2)}`),
    el("span", "", ` · advantage ${signed(end.advantage, 2)} · ${STOPS[stop] || stop} · ${counted(end.tokens, "token")}`)];
}
function decisionText(decision) {
  const rule = opened.tree.rule, values = [];
  if (decision.entropy_nats !== null) values.push(`H ${number(decision.entropy_nats, 4)}`);
  if (decision.delta !== null) values.push(`ΔH ${signed(decision.delta, 6)}`);
  if (decision.probability !== null) values.push(`P ${number(decision.probability, 6)}`);
  if (decision.reason) values.push(decision.reason);
  for (const [name, value] of Object.entries(rule)) if (name !== "name") values.push(`${SYMBOLS[name] || name} ${value}`);
  const what = decision.granted ? `Branched: ${counted(decision.granted, "extra turn")}`
    : decision.fires ? "The rule fired, but no leaves were left" : "Not branched";
  return `${what}${values.length ? " — " : ""}${values.join(", ")}${rule.name ? ` (${rule.name})` : ""}`;
}
function turnBlock(node) {
  const entropies = node.entropies || [], entropy = meanOf(entropies), made = el("div", "node");
  made.style.borderLeftColor = entropy === null ? "" : colour(entropy);
  const cells = el("span", "cells", ...entropies.slice(0, 40).map(cell));
  made.append(el("div", "head", el("span", "role of-model", "model"), el("span", "", counted(node.tokens, "token")),
    entropy === null ? null : el("span", "", `H ${number(entropy)} nats`), cells, times(node)), longText(node.text));
  if (node.unread) made.append(el("div", "note", `No room for the result of ${node.unread.join(", ")}`));
  if (node.end) made.append(el("div", "head", ...outcome(node.end, node.stop)));
  return made;
}
const times = (node) => node.span ? el("span", "", `${number(node.span[0], 2)}–${number(node.span[1], 2)} s`) : null;
function resultBlock(node) {
  const made = el("div", "node"), calls = node.calls || [];
  for (const call of calls) {
    made.append(el("div", "head", el("span", "role of-tool", call.source === "refused" ? "refused call" : call.name),
      el("span", call.ok ? "good" : "bad", call.ok ? "ok" : `failed: ${call.failure}`),
      el("span", "", call.source === "executed" ? `${number(call.seconds, 2)} s` : call.source),
      calls.length === 1 ? el("span", "", counted(node.tokens, "token")) : null, times(node)));
    if (Object.keys(call.arguments).length) {
      const given = Object.entries(call.arguments).map(([name, value]) => `${name}: ${asText(value)}`);
      made.append(el("details", "", el("summary", "note", "arguments"), longText(given.join("\n"))));
    }
    made.append(longText(call.text));
  }
  if (!calls.length) made.append(el("div", "head", el("span", "role of-tool", "notice"), el("span", "", counted(node.tokens, "token"))), longText(node.text));
  if (calls.length > 1) made.append(el("div", "note", `${counted(node.tokens, "token")} in all`));
  if (node.decision) made.append(el("div", node.decision.granted ? "decision granted" : "decision", decisionText(node.decision)));
  return made;
}
// One path, from a fork or the root to the next fork or its end. Its contents are made when it is opened.
function pathBlock(start, isBranch) {
  const { tree, children } = opened, chain = [start];
  while (children[chain[chain.length - 1]].length === 1) chain.push(children[chain[chain.length - 1]][0]);
  const last = chain[chain.length - 1], end = tree.nodes[last].end, below = leavesBelow(last);
  const name = el("span", isBranch ? "strong branch" : "strong", `${isBranch ? "branch" : "path"} ${tree.nodes[start].path}`);
  const made = el("details", "path", el("summary", "", name, " · ", ...(end ? outcome(end, tree.nodes[last].stop)
    : [`${counted(chain.length, "node")}, then a fork into ${counted(children[last].length, "turn")} with ${counted(below.length, "leaf", "leaves")}, mean reward ${number(meanOf(below.map((each) => each.reward).filter((reward) => reward !== null)), 2)}`])));
  made.fill = () => {
    if (made.filled) return;
    made.filled = true;
    for (const each of chain) made.append(tree.nodes[each].kind === "turn" ? turnBlock(tree.nodes[each]) : resultBlock(tree.nodes[each]));
    addPaths(made, children[last], tree.nodes[last].kind === "observation");
  };
  made.addEventListener("toggle", () => made.open && made.fill());
  for (const each of chain) opened.blocks.set(each, made);
  return made;
}
function addPaths(to, starts, atFork, from = 0) {
  const shown = starts.slice(from, from + SHOWN_CHILDREN);
  shown.forEach((start, i) => {
    const block = pathBlock(start, atFork && from + i > 0);
    to.append(block);
    if (opened.tree.nodes.length <= OPEN_NODES) { block.fill(); block.open = true; }
  });
  const rest = starts.length - from - shown.length;
  if (rest > 0) {
    const more = button(`Show ${Math.min(rest, SHOWN_CHILDREN)} of ${rest.toLocaleString("en")} more paths`, () => { more.remove(); addPaths(to, starts, atFork, from + SHOWN_CHILDREN); });
    to.append(more);
  }
}
function leavesBelow(node) {
  const ends = [], stack = [node];
  while (stack.length) {
    const each = stack.pop();
    if (opened.tree.nodes[each].end) ends.push(opened.tree.nodes[each].end);
    stack.push(...opened.children[each]);
  }
  return ends;
}
// Addresses compare number by number, and a path comes before its branches.
function inOrder(a, b) {
  for (let i = 0; i < Math.min(a.length, b.length); i += 1) if (a[i] !== b[i]) return a[i] - b[i];
  return a.length - b.length;
}
function goToLeaf(leaf) {
  const up = [];
  for (let node = leaf; node; node = opened.tree.nodes[node].parent) up.push(node);
  for (const node of up.reverse()) {
    const block = opened.blocks.get(node);
    if (!block) return; // among the paths that are not shown yet
    block.fill();
    block.open = true;
  }
  for (const block of document.querySelectorAll(".path.target")) block.classList.remove("target");
  const block = opened.blocks.get(leaf);
  block.classList.add("target");
  block.scrollIntoView({ block: "start", behavior: "smooth" });
}
function tokenBar(tree) {
  const counts = { prompt: tree.prompt_tokens, model: 0, tool: 0 };
  for (const node of tree.nodes.slice(1)) counts[node.kind === "turn" ? "model" : "tool"] += node.tokens;
  const bar = el("div", "bar");
  for (const [kind, count] of Object.entries(counts)) {
    const part = el("i", kind);
    part.style.flexGrow = count;
    bar.append(part);
  }
  const stored = counts.model + counts.tool;
  return [bar, el("div", "head", ...Object.entries(counts).map(([kind, count]) => el("span", kind === "prompt" ? "role" : `role of-${kind}`, `${kind} ${count.toLocaleString("en")}`)),
    el("span", "", `tokens, each node once; the paths have ${tree.leaf_tokens.toLocaleString("en")}, ${number(tree.leaf_tokens / (stored || 1), 2)} times as many`))];
}
function show(key) {
  const group = index.groups.find((each) => each.key === key);
  if (!group) return;
  const tree = treeOf(key), children = tree.nodes.map(() => []);
  tree.nodes.forEach((node, i) => i && children[node.parent].push(i));
  // A branch may have started before the path goes on; by its address the path comes first.
  const address = (i) => tree.nodes[i].path.split(",").map(Number);
  for (const starts of children) if (starts.length > 1) starts.sort((a, b) => inOrder(address(a), address(b)));
  opened = { tree, children, blocks: new Map() };
  open = key;
  for (const each of document.querySelectorAll(".group")) each.setAttribute("aria-current", String(each.dataset.key === key));
  const ends = tree.nodes.map((node, i) => [node, i]).filter(([node]) => node.end)
    .sort(([a], [b]) => inOrder(a.end.address, b.end.address));
  const leaves = el("div", "leaves", ...ends.slice(0, 200).map(([node, i]) => {
    const made = button(`${node.end.reward === null ? "none" : number(node.end.reward, 2)} / ${signed(node.end.advantage, 2)}`, () => goToLeaf(i));
    made.className = outcomeClass(node.end.reward);
    made.title = `path ${node.end.address.join(",")}`;
    return made;
  }));
  const facts = el("dl");
  if (tree.answers.length) facts.append(el("dt", "", "expected"), el("dd", "", tree.answers.join(" | ")));
  if (tree.rule.name) facts.append(el("dt", "", "branch rule"), el("dd", "", `${tree.rule.name}: ` + Object.entries(tree.rule).filter(([name]) => name !== "name").map(([name, value]) => `${SYMBOLS[name] ? SYMBOLS[name] + " " : ""}${name} = ${value}`).join(", ")));
  const paths = el("div");
  const every = (state) => { for (const block of paths.querySelectorAll("details.path")) { if (state) block.fill(); block.open = state; } };
  const expand = () => { let before; do { before = paths.querySelectorAll("details.path").length; every(true); } while (paths.querySelectorAll("details.path").length > before); };
  $("tree").replaceChildren(
    Object.assign(button("‹ Groups", () => { document.body.classList.remove("reading"); history.replaceState(null, "", "#"); }), { className: "back" }),
    el("h2", "", `Step ${group.step}, group ${group.group}${group.kind === "eval" ? ", evaluation" : ""}`),
    el("details", "", el("summary", "", question(group.prompt)), longText(tree.prompt)), facts, ...tokenBar(tree),
    el("p", "note", "Entropy of a turn's first tokens: 0 ", el("span", "cells scale", ...Array.from({ length: 11 }, (_, i) => cell(scale * i / 10))), ` ${number(scale, 2)} nats or more. Reward / advantage per leaf:`), leaves,
    el("div", "row", button("Expand all", expand), button("Collapse all", () => every(false))), paths);
  addPaths(paths, children[0], false);
  document.body.classList.add("reading");
  history.replaceState(null, "", "#" + encodeURIComponent(key));
  if (window.innerWidth < 832) window.scrollTo(0, 0);
}

// Controls ----------------------------------------------------------------------------------------------------------
const THEMES = ["auto", "dark", "light"];
function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("arpo-theme", name); } catch { /* a file may have no storage */ }
}
let theme = "auto", timer = 0;
try { theme = THEMES.includes(localStorage.getItem("arpo-theme")) ? localStorage.getItem("arpo-theme") : "auto"; } catch { /* the same */ }
setTheme(theme);
$("theme").addEventListener("click", () => setTheme(theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]));
$("filters").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["step", "order", "wrong", "branched", "failed"]) $(id).addEventListener("change", () => filter());
for (const id of ["search", "low", "high"]) $(id).addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 200); });
$("clear").addEventListener("click", () => { $("filters").reset(); filter(); });
$("previous").addEventListener("click", () => { at -= 1; showList(); $("list").scrollTop = 0; });
$("next").addEventListener("click", () => { at += 1; showList(); $("list").scrollTop = 0; });

// A live run --------------------------------------------------------------------------------------------------------
function takeIn(change) {
  const there = new Set(change.files), fresh = new Set(change.groups.map((group) => group.file));
  const kept = index.groups.filter((group) => there.has(group.file) && !fresh.has(group.file));
  for (const group of change.groups) {
    trees.set(group.key, group.tree);
    texts.delete(group.key);
    delete group.tree;
  }
  const order = new Map(change.files.map((name, i) => [name, i]));
  const groups = [...kept, ...change.groups].sort((a, b) => order.get(a.file) - order.get(b.file));
  Object.assign(index, change, { groups });
  showCurves(); showFacts(); showSteps(); filter(true);
}
async function follow() {
  try {
    const answer = await fetch(`changes?after=${index.revision}`), change = await answer.json();
    if (!answer.ok) throw new Error(change.error);
    if (change.revision !== index.revision) takeIn(change);
    else showFacts();
    $("facts").textContent += " · live";
  } catch (error) {
    showFacts();
    $("facts").textContent += ` · not connected: ${error.message}`;
  }
  setTimeout(follow, 2000);
}

showCurves(); showFacts(); showSteps(); filter();
let wanted = "";
try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { /* not a key of ours */ }
if (wanted && blocks.has(wanted)) show(wanted);
else if (found.length && window.innerWidth >= 832) { show(found[0].key); history.replaceState(null, "", "#"); }
document.body.dataset.ready = "true";
if (index.live) setTimeout(follow, 2000);
