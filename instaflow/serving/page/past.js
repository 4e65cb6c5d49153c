// What was drawn before, in this tab: small copies, and what to ask to see it again.

import {noise} from "./state.js";

const KEY = "instaflow-history";
const MOST = 24;
const SIDE = 96; // pixels of a copy, unless the image is smaller

export class Past {
  constructor(again) {
    this.again = again;
    this.entries = load();
    document.getElementById("forget").addEventListener("click", () => {
      this.entries = [];
      this.keep();
      document.getElementById("prompt").focus();
    });
    this.show();
  }

  add(state, image) {
    const wanted = structuredClone(state);
    const same = entry => JSON.stringify(entry.wanted) === JSON.stringify(wanted);
    if (this.entries.length && same(this.entries[0])) return;
    this.entries = [{wanted, copy: copyOf(image)}, ...this.entries.filter(entry => !same(entry))].slice(0, MOST);
    this.keep();
  }

  keep() {
    while (this.entries.length) {
      try {
        sessionStorage.setItem(KEY, JSON.stringify(this.entries));
        break;
      } catch { // full: the oldest goes
        this.entries.pop();
      }
    }
    if (!this.entries.length) sessionStorage.removeItem(KEY);
    this.show();
  }

  show() {
    document.getElementById("past").hidden = !this.entries.length;
    document.getElementById("history").replaceChildren(...this.entries.map(({wanted, copy}) => {
      const button = document.createElement("button"), image = new Image();
      const words = document.createElement("span"), from = document.createElement("small");
      button.type = "button";
      image.src = copy;
      image.alt = "";
      image.onload = () => image.classList.toggle("small", image.naturalWidth < SIDE);
      words.textContent = wanted.prompt.slice(0, 60) || "no prompt";
      from.textContent = noise(wanted);
      button.append(image, words, from);
      button.title = `${wanted.prompt.slice(0, 300)} (${noise(wanted)})`;
      button.addEventListener("click", () => this.again(wanted));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }));
  }
}

function copyOf(image) {
  const scale = Math.min(1, SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * image.naturalWidth));
  canvas.height = Math.max(1, Math.round(scale * image.naturalHeight));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(scale < 1 ? "image/webp" : "image/png");
}

function load() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEY));
    return Array.isArray(kept) ? kept : [];
  } catch {
    return [];
  }
}
