// What is asked for, kept in the address: a reload, a bookmark and another tab bring it back.

const FIRST = {prompt: "", seed: 0, seed_to: 1, position: 0, how: {}};
const PAUSE = 250; // ms: browsers take few changes of the address a second

export const state = read();
let writing = 0;

function whole(text, otherwise) {
  const number = Number(text);
  return text !== null && text !== "" && Number.isSafeInteger(number) && number >= 0 ? number : otherwise;
}

export function read() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const position = Number(kept.get("position"));
  const how = Object.create(null); // for names that another wrote: none is every object's own
  for (const [key, value] of kept) {
    const [what, name] = [key.slice(0, key.indexOf(".")), key.slice(key.indexOf(".") + 1)];
    if (what === "steps" || what === "guidance") (how[name] ??= {})[what] = value;
  }
  return {
    prompt: kept.get("prompt") ?? FIRST.prompt,
    seed: whole(kept.get("seed"), FIRST.seed),
    seed_to: whole(kept.get("seed_to"), FIRST.seed_to),
    position: position >= 0 && position <= 1 ? position : FIRST.position,
    how,
  };
}

export function write() {
  clearTimeout(writing);
  writing = setTimeout(writeNow, PAUSE);
}

export function writeNow() {
  clearTimeout(writing);
  const kept = new URLSearchParams();
  for (const key of ["prompt", "seed", "seed_to", "position"]) {
    if (state[key] !== FIRST[key]) kept.set(key, state[key]);
  }
  for (const [name, how] of Object.entries(state.how)) {
    for (const [what, value] of Object.entries(how)) if (value !== "") kept.set(`${what}.${name}`, value);
  }
  history.replaceState(null, "", `${location.pathname}#${kept}`);
}
addEventListener("pagehide", writeNow);

// Of a request or a state: which noise it is drawn from.
export function noise({seed, seed_to, position}) {
  return position > 0 ? `seed ${seed} → ${seed_to} at ${position}` : `seed ${seed}`;
}

// The body of a request; steps and guidance are the model's own where none are typed.
export function asked(offer) {
  const body = {model: offer.name, prompt: offer.prompts === "none" ? "" : state.prompt, seed: state.seed};
  if (state.position > 0) Object.assign(body, {seed_to: state.seed_to, position: state.position});
  const {steps = "", guidance = ""} = state.how[offer.name] ?? {};
  if (steps !== "") body.num_steps = Number(steps);
  if (guidance !== "") body.guidance_scale = Number(guidance);
  return body;
}
