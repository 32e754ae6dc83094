"use strict";
(() => {
  const tip = document.getElementById("tip");
  const place = (x, y) => {
    const margin = 12;
    const left = Math.min(x + margin, document.documentElement.clientWidth - tip.offsetWidth - margin);
    const below = y + margin + tip.offsetHeight < document.documentElement.clientHeight;
    tip.style.left = `${Math.max(left, margin) + window.scrollX}px`;
    tip.style.top = `${(below ? y + margin : y - margin - tip.offsetHeight) + window.scrollY}px`;
  };
  const show = (text, x, y) => { tip.textContent = text; tip.hidden = false; place(x, y); };
  const hide = () => { tip.hidden = true; };

  // A <title> is the hover text where scripts are off; here the same words get a better box.
  for (const title of document.querySelectorAll("svg.chart title")) {
    const mark = title.parentElement;
    const text = title.textContent;
    title.remove();
    if (!mark.hasAttribute("aria-label")) mark.setAttribute("aria-label", text);
    mark.dataset.tip = text;
    mark.addEventListener("pointermove", (event) => show(text, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => {
      const box = mark.getBoundingClientRect();
      show(text, box.right, box.top);
    });
    mark.addEventListener("blur", hide);
    if (mark.classList.contains("line")) {
      mark.addEventListener("pointerenter", () => mark.classList.add("hot"));
      mark.addEventListener("pointerleave", () => mark.classList.remove("hot"));
    }
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const form = document.querySelector(".filters");
  if (form) {
    const selects = [...form.querySelectorAll("select")];
    const names = selects.map((select) => select.dataset.filter);
    const marked = [...document.querySelectorAll("[data-router]")];
    const apply = () => {
      for (const element of marked) {
        const fits = names.every((name, i) => {
          const wanted = selects[i].value;
          const has = element.getAttribute(`data-${name}`);
          return wanted === "" || has === null || has === wanted;
        });
        element.classList.toggle("off", !fits);
      }
      const points = document.querySelectorAll("#front .mark[data-router], #front g.mark[data-router]");
      const left = [...points].filter((point) => !point.classList.contains("off")).length;
      const filtered = selects.some((select) => select.value !== "");
      form.querySelector("output").textContent = filtered ? `${left} of ${points.length} configurations shown` : "";
    };
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply, 0));
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  // Paper has no folds.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = true;
  });
  window.addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
})();
