// What the account made, newest first.

import { call, local } from "./api.js";
import { at, attempt, element } from "./dom.js";
import { signIn } from "./signing-in.js";

attempt(async () => {
  await signIn();
  const page = await call("GET", "/v1/predictions");
  at("predictions").replaceChildren(
    ...page.results.map((one) =>
      element("li", {}, element("a", { href: local(`/p/${one.id}`), textContent: one.model }), ` ${one.status}`),
    ),
  );
});
