// The page at work: images in, answers out; enrol, forget. One thing is done at a time.

import { ask, form, key, parts, setKey, uniqueKey } from "./api.js";
import { onForget, refresh } from "./classes.js";
import { Card } from "./results.js";

const TOGETHER = 16; // images in one request, so that answers appear as they come
const [files, drop, error, status, asked, rate, enrol, label, keyBox, keyField] = [
  "files", "drop", "error", "status", "asked", "rate", "enrol", "label", "key", "key-field",
].map((id) => document.getElementById(id));
let cards = [];
let work = Promise.resolve();

// Does one thing after what is under way, and says what went wrong.
function run(saying, act) {
  work = work.then(async () => {
    error.hidden = true;
    status.textContent = saying;
    document.body.setAttribute("aria-busy", "true");
    try {
      status.textContent = (await act()) ?? "";
    } catch (reason) {
      status.textContent = "";
      complain(reason);
    }
    document.body.removeAttribute("aria-busy");
  });
  return work;
}

function complain(reason) {
  error.textContent = reason.message;
  error.hidden = false;
  if (reason.status === 401) {
    error.textContent = key() ? "The key is not valid: enter another one above." : "A key is needed: enter it above.";
    keyBox.open = true;
    keyField.focus();
  }
}

async function load() {
  const [served, bundle] = await Promise.all([ask("./"), ask("v1/bundle")]);
  document.getElementById("served").textContent = `${served.model} · ${served.bundle.slice(7, 19)}`;
  const before = rate.value || "0.05";
  rate.replaceChildren(
    ...Object.keys(bundle.calibration.limits)
      .sort((a, b) => a - b)
      .map((one) => new Option(`${+(100 * one).toFixed(2)} %`, one, false, Number(one) === Number(before))),
  );
  await refresh();
}

function add(given) {
  const added = [...given].map((file) => new Card(file));
  if (!added.length) return;
  cards.push(...added);
  asked.hidden = false;
  run("Asking…", () => classify(added));
}

async function classify(some) {
  try {
    for (const part of parts(some, TOGETHER)) {
      const path = `v1/classify?on_error=partial&false_reject=${rate.value || 0.05}`;
      const answer = await ask(path, { method: "POST", body: form(part.map((card) => card.file)) });
      answer.data.forEach((entry) => part[entry.index].show(entry));
    }
  } catch (reason) {
    some.forEach((card) => card.wait());
    throw reason;
  }
}

async function enrolAs(name, chosen) {
  let enrolled = 0;
  for (const part of parts(chosen, TOGETHER)) {
    const answer = await ask(`v1/classes/${encodeURIComponent(name)}/examples?on_error=partial`, {
      method: "POST",
      body: form(part.map((card) => card.file)),
      headers: { "Idempotency-Key": uniqueKey() },
    });
    enrolled += answer.data.filter((entry) => entry.object !== "error").length;
  }
  await refresh();
  await classify(cards);
  const failed = chosen.length - enrolled;
  return `Enrolled ${enrolled} as “${name}”${failed ? `; ${failed} could not be used` : ""}.`;
}

files.addEventListener("change", () => {
  add(files.files);
  files.value = "";
});

for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    if (name === "drop" || !event.relatedTarget) drop.classList.remove("over");
  });
}
document.addEventListener("drop", (event) => add(event.dataTransfer.files));
document.addEventListener("paste", (event) => add(event.clipboardData?.files ?? []));

rate.addEventListener("change", () => run("Asking…", () => classify(cards)));

document.getElementById("clear").addEventListener("click", () => {
  cards.forEach((card) => card.remove());
  cards = [];
  asked.hidden = true;
  files.focus();
});

enrol.addEventListener("submit", (event) => {
  event.preventDefault();
  const chosen = cards.filter((card) => card.chosen);
  if (chosen.length) run("Enrolling…", () => enrolAs(label.value, chosen));
  else complain(new Error("choose at least one image to enrol"));
});

onForget((name) =>
  run("Forgetting…", async () => {
    const answer = await ask(`v1/classes/${encodeURIComponent(name)}`, { method: "DELETE" });
    await refresh();
    await classify(cards);
    return `Forgot “${name}” with ${answer.items} ${answer.items === 1 ? "image" : "images"}.`;
  }),
);

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(keyField.value.trim());
  keyBox.open = false;
  run("", load);
});

keyField.value = key();
run("", load);
