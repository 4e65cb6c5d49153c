// The page: fields to state, state to cards; history; the same as a command.

import {Card} from "./cards.js";
import {Past} from "./past.js";
import {asked, read, state, write} from "./state.js";

const $ = id => document.getElementById(id);
const SETTLED = 900; // ms without a change: then it belongs to the history
const ALIVE = 10000; // ms between two looks at the server
let cards = [];
let settling = 0;

const past = new Past(entry => {
  Object.assign(state, structuredClone(entry));
  fill();
  askAll(true);
});

function fill() {
  for (const key of ["prompt", "seed", "seed_to", "position"]) $(key).value = state[key];
  $("class").value = state.prompt;
  cards.forEach(card => card.reload());
}

function askAll(now = false) {
  write();
  $("at").textContent = state.position > 0 ? `: ${state.position}` : "";
  cards.forEach(card => card.ask(now));
  if (cards.length) $("curl").textContent = command(asked(cards[0].offer));
}

// After each image: the bars, and in a while the history, unless one failed, and how many the server has drawn.
function told(card, status) {
  if (status !== undefined) connected(status !== 0);
  const slowest = Math.max(...cards.map(one => one.result?.drawing ?? 0));
  cards.forEach(one => one.compare(slowest || 1));
  clearTimeout(settling);
  settling = setTimeout(() => {
    const first = cards.find(one => one.result);
    const settled = cards.every(one => one.shown === one.asked && !one.failed);
    if (first?.image.naturalWidth && settled) past.add(state, first.image);
    look();
  }, SETTLED);
}

function connected(yes, detail = "") {
  $("link").classList.toggle("lost", !yes);
  $("link").textContent = yes ? detail || $("link").dataset.was || "" : "The server does not answer";
  if (yes && detail) $("link").dataset.was = detail;
}

function command(body) {
  const json = JSON.stringify(body, null, 1).replace(/\n\s*/g, " ").replaceAll("'", "\\u0027");
  const token = wants_token ? ` -H "Authorization: Bearer $TOKEN"` : "";
  return `curl ${location.origin}/api/images${token} -H 'Content-Type: application/json' -d '${json}' -o image.png`;
}

function listen() {
  $("prompt").addEventListener("input", () => {
    state.prompt = $("prompt").value;
    $("class").value = state.prompt;
    askAll();
  });
  $("prompt").addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault(); // Enter: the slow ones, too, at once
    askAll(true);
  });
  $("class").addEventListener("input", () => {
    state.prompt = $("prompt").value = $("class").value;
    askAll();
  });
  for (const key of ["seed", "seed_to"]) {
    $(key).addEventListener("input", () => {
      if ($(key).value === "" || !$(key).reportValidity()) return;
      state[key] = Number($(key).value);
      askAll();
    });
  }
  $("position").addEventListener("input", () => {
    state.position = Number($("position").value);
    askAll();
  });
  for (const button of document.querySelectorAll("button.new")) {
    button.addEventListener("click", () => {
      const key = button.dataset.for;
      state[key] = $(key).value = crypto.getRandomValues(new Uint32Array(1))[0];
      if (key === "seed") state.position = $("position").value = 0;
      else if (state.position === 0) state.position = $("position").value = 1;
      askAll();
    });
  }
  $("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren($("curl"));
    await navigator.clipboard?.writeText($("curl").textContent).catch(() => {});
  });
  addEventListener("hashchange", () => {
    Object.assign(state, read());
    fill();
    askAll(true);
  });
}

function chooseClasses(offers) {
  const classes = offers.find(offer => offer.prompts === "class")?.classes ?? [];
  $("classes").hidden = !classes.length;
  $("class").append(new Option("choose one", ""), ...classes.map(name => new Option(name)));
}

async function look() {
  const found = await fetch("api/health").then(answer => answer.json()).catch(() => null);
  connected(found?.status === "ok", found && `${found.drawn.toLocaleString()} drawn`);
}

async function alive() {
  await look();
  setTimeout(alive, ALIVE);
}

const {models, wants_token} = await fetch("api/models").then(answer => answer.json()).catch(() => ({models: []}));
cards = models.map(offer => new Card(offer, told));
$("cards").classList.toggle("one", cards.length === 1);
$("cards").append(...cards.map(card => card.element));
chooseClasses(models);
state.prompt ||= $("prompt").value; // typed before the models were known
fill();
listen();
askAll(true);
alive();
