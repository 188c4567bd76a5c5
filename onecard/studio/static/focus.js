// The keyboard's place on the page: never lost because the part that had it was disabled, hidden or taken away.

const FOCUSABLE = "button, input, select, textarea, summary, a[href], [tabindex]";
const canTake = (part) => part.isConnected && !part.disabled && part.getClientRects().length > 0;

// Put the focus on a part, once what x-show uncovers is there: a hidden or disabled one cannot have it.
export function focusOn(id, tries = 60) {
  const part = document.getElementById(id);
  if (part && canTake(part)) part.focus();
  if (tries && document.activeElement !== part) requestAnimationFrame(() => focusOn(id, tries - 1));
}

// The same where the focus is on one of these parts or nowhere: a person who has gone elsewhere meanwhile is left there.
export function focusFrom(ids, id) {
  const { activeElement: at } = document;
  if (at === document.body || ids.includes(at.id)) focusOn(id);
}

// Within `root`: a button that disables itself while it works has the focus again when it can; where the part is gone or
// hidden, what stands beside it has. A person who leaves a part, by a click beside it or by Tab, is not called back.
export function keepFocus(root) {
  let last = null;
  let around = [];
  root.addEventListener("focusin", ({ target }) => {
    last = target;
    around = [];
    for (let part = target.parentElement; part && part !== root; part = part.parentElement) around.push(part);
  });
  root.addEventListener("focusout", ({ target }) => {
    if (target === last && canTake(target)) last = null;
  });
  const look = () => {
    if (!last || document.activeElement !== document.body) return;
    if (canTake(last)) last.focus();
    else if (!last.isConnected || !last.getClientRects().length) {
      const near = around.filter(canTake).flatMap((part) => [...part.querySelectorAll(FOCUSABLE)]).find(canTake);
      if (near) near.focus();
    }
  };
  new MutationObserver(() => requestAnimationFrame(look))
    .observe(root, { subtree: true, childList: true, attributes: true, attributeFilter: ["disabled", "style"] });
}
