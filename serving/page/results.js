// Images and what the service says of them, each on a card. Whatever comes from outside is set as text.

import { picture } from "./api.js";

const list = document.getElementById("cards");
const template = document.getElementById("card");

export class Card {
  constructor(file) {
    this.file = file;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.address = URL.createObjectURL(file);
    const name = file.name || "pasted image";
    this.#part(".name").textContent = name;
    const shown = this.#part(".shown");
    shown.src = this.address;
    shown.addEventListener("error", () => shown.removeAttribute("src")); // no kind of image that browsers show
    this.#part(".choice span").textContent = `enrol ${name}`;
    list.append(this.element);
  }

  get chosen() {
    return this.#part(".choice input").checked;
  }

  set chosen(value) {
    this.#part(".choice input").checked = value;
  }

  // Shows one entry of a classification's answer.
  show(entry) {
    if (entry.object === "error") {
      this.fail(entry.error.message.replace(/^image \d+: /, ""));
      return;
    }
    this.element.className = `card ${entry.known ? "known" : "unknown"}`;
    this.#part(".verdict").textContent = entry.known ? entry.label : "unknown";
    const verb = entry.known ? "reaches" : "is under";
    this.#part(".similarity").textContent =
      `Similarity ${digits(entry.similarity)} ${verb} the threshold ${digits(entry.threshold)}; ` +
      `probability ${percent(entry.probability)}`;
    setShare(this.#part(".needed .fill"), entry.similarity);
    setShare(this.#part(".needed .least"), entry.threshold);
    this.#part(".scores").replaceChildren(...entry.classes.map(score));
    this.#part(".near").replaceChildren(...entry.neighbors.map(neighbor));
    this.#part(".answer").hidden = false;
  }

  fail(message) {
    this.element.className = "card failed";
    this.#part(".verdict").textContent = message;
    this.#part(".answer").hidden = true;
    this.chosen = false;
  }

  // Says that there is no answer yet, unless there is one.
  wait() {
    if (this.element.className === "card") this.#part(".verdict").textContent = "no answer";
  }

  remove() {
    this.element.remove();
    URL.revokeObjectURL(this.address);
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }
}

function neighbor(near) {
  const none = element("span", "none");
  const item = element("li", "", none, text(near.label), element("br"), faint(digits(near.similarity)));
  const metadata = JSON.stringify(near.metadata);
  item.title = metadata === "{}" ? near.id : metadata;
  picture(near.thumbnail).then(
    (address) => {
      const image = element("img");
      image.alt = "";
      image.src = address;
      none.replaceWith(image);
    },
    () => {}, // an item without a picture
  );
  return item;
}

function score(one) {
  const fill = element("div", "fill");
  setShare(fill, one.probability);
  return element("li", "", text(one.label), faint(percent(one.probability)), element("div", "bar", fill));
}

function setShare(bar, share) {
  bar.style.setProperty("--share", Math.min(1, Math.max(0, share)));
}

export function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function text(value) {
  const made = element("span");
  made.textContent = value;
  return made;
}

function faint(value) {
  const made = text(value);
  made.className = "faint";
  return made;
}

function digits(value) {
  return value.toFixed(3);
}

function percent(value) {
  return `${(100 * value).toFixed(1)} %`;
}
