// A card for each model: asks for its image, shows it with its time.

import {asked, noise, state, write} from "./state.js";

const CLIENT = Array.from(crypto.getRandomValues(new Uint8Array(8)), byte => byte.toString(16).padStart(2, "0")).join("");
const SLOW = 300; // ms of drawing: such a model waits until typing pauses
const PAUSE = 350; // ms without a key
const SMALL = 128; // pixels: such images are shown with their pixels

export class Card {
  constructor(offer, told) {
    this.offer = offer;
    this.told = told; // called after each image and each failure
    this.asked = this.shown = 0; // the numbers of the last change, and of the one that is answered
    this.failed = false; // whether that answer is an error
    this.perStep = 0; // ms, as measured
    this.result = null;
    this.element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    this.find = name => this.element.querySelector(name);
    this.find("h2").textContent = offer.name;
    const size = `${offer.width}×${offer.height}`;
    this.find(".kind").textContent = offer.name === offer.kind ? size : `${offer.kind}, ${size}`;
    this.element.setAttribute("aria-label", offer.name);
    this.picture = this.find(".picture");
    this.picture.style.aspectRatio = `${offer.width} / ${offer.height}`;
    this.image = this.find("img");
    this.image.classList.toggle("small", Math.max(offer.width, offer.height) < SMALL);
    for (const [name, key, value] of [[".steps", "steps", offer.num_steps], [".guidance", "guidance", offer.guidance_scale]]) {
      const input = this.find(name);
      input.placeholder = value;
      input.value = state.how[offer.name]?.[key] ?? "";
      input.addEventListener("input", () => {
        (state.how[offer.name] ??= {})[key] = input.value;
        write();
        this.ask();
      });
    }
  }

  reload() {
    this.find(".steps").value = state.how[this.offer.name]?.steps ?? "";
    this.find(".guidance").value = state.how[this.offer.name]?.guidance ?? "";
  }

  get slow() {
    const steps = Number(state.how[this.offer.name]?.steps || this.offer.num_steps);
    return this.perStep ? this.perStep * steps > SLOW : steps > 4;
  }

  // Ask for what is wanted now: at once, or if the model is slow after a pause without keys. What is seen is old from here.
  ask(now = false) {
    clearTimeout(this.timer);
    this.asked++;
    if (!state.prompt.trim() && this.offer.prompts !== "none") return this.clear();
    this.picture.classList.add("stale");
    this.timer = setTimeout(() => this.send(), this.slow && !now ? PAUSE : 0);
  }

  clear() {
    this.shown = this.asked;
    this.result = null;
    this.failed = false;
    this.image.hidden = true;
    this.find(".blank").hidden = false;
    this.find(".save").hidden = this.find(".note").hidden = this.find(".error").hidden = true;
    this.find(".seconds").textContent = "–";
    this.picture.classList.remove("stale");
    this.told(this);
  }

  async send() {
    const number = this.asked, body = asked(this.offer), begun = performance.now();
    let answer, failure = null, file = null;
    try {
      answer = await fetch("api/images", {
        method: "POST",
        headers: {"Content-Type": "application/json", "Accept": "image/png"},
        body: JSON.stringify({...body, client: CLIENT}),
      });
      if (answer.ok) file = await answer.blob();
      else failure = await answer.json().catch(() => ({error: `The server answered ${answer.status}`, hint: ""}));
    } catch {
      failure = {error: "The server does not answer", hint: "Is it still running? A change here asks again"};
      answer = {status: 0};
    }
    if (number <= this.shown) return; // a newer one is seen already
    if (answer.status === 409 || answer.status === 429) {
      if (number === this.asked) this.timer = setTimeout(() => this.send(), 1000 * Number(answer.headers.get("Retry-After") ?? 0.2));
      return;
    }
    if (failure && number < this.asked) return;
    this.shown = number;
    if (failure) this.fail(failure);
    else this.show(file, body, JSON.parse(answer.headers.get("X-InstaFlow")), performance.now() - begun);
    this.picture.classList.toggle("stale", failure !== null || number < this.asked);
    this.told(this, answer.status);
  }

  fail({error, hint}) {
    this.result = null;
    this.failed = true;
    this.find(".save").hidden = this.find(".note").hidden = true;
    this.find(".seconds").textContent = this.image.hidden ? "–" : "The image is that of an earlier request";
    this.find(".error").textContent = hint ? `${error}. ${hint}.` : `${error}.`;
    this.find(".error").hidden = false;
  }

  show(file, body, facts, passed) {
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    this.image.src = URL.createObjectURL(file);
    this.image.alt = `${this.offer.name} draws: ${body.prompt.slice(0, 200)} (${noise(body)})`;
    this.image.hidden = false;
    this.find(".blank").hidden = this.find(".error").hidden = true;
    this.perStep = 1000 * facts.seconds.drawing / facts.num_steps;
    this.result = {drawing: facts.seconds.drawing};
    this.failed = false;
    const steps = facts.num_steps === 1 ? "1 step" : `${facts.num_steps} steps`;
    this.find(".seconds").textContent = `${duration(facts.seconds.drawing)} for ${steps}, here after ${duration(passed / 1000)}`;
    const notes = facts.truncated ? [`Longer than the model reads: cut after ${this.offer.max_tokens} tokens.`] : [];
    if (facts.note) notes.push(`${facts.note}.`);
    this.find(".note").textContent = notes.join(" ");
    this.find(".note").hidden = !notes.length;
    const save = this.find(".save");
    save.href = this.image.src;
    save.download = `${this.offer.name}-${noise(body).replace(/[^\w.]+/g, "-")}.png`;
    save.hidden = false;
  }

  // The bar: this model's time as a part of the slowest one's.
  compare(slowest) {
    this.find(".bar i").style.width = this.result ? `${100 * this.result.drawing / slowest}%` : "0";
  }
}

function duration(seconds) {
  return seconds < 0.9995 ? `${Math.max(1, Math.round(1000 * seconds))} ms` : `${seconds.toFixed(seconds < 9.95 ? 1 : 0)} s`;
}
