// The form that asks for a token, and the button that forgets it.

import { call, forgetToken, hasToken, keepToken } from "./api.js";

const at = (name) => document.getElementById(name);

// Show the form until a token is accepted; `reason` says what the last one lacked.
function askForToken(reason) {
  at("ask").hidden = false;
  at("ask-trouble").textContent = reason;
  at("token").focus();
  return new Promise((resolve) => {
    at("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      keepToken(at("token").value);
      at("token").value = "";
      at("ask").hidden = true;
      resolve();
    }, { once: true });
  });
}

// Return the account, once there is a token that opens one; servers without tokens have one too.
export async function signIn() {
  let reason = "";
  for (;;) {
    try {
      const account = await call("GET", "/v1/account");
      at("leave").hidden = !hasToken();
      return account;
    } catch (refused) {
      if (refused.status !== 401) throw refused;
      reason = hasToken() ? "This server does not know that token." : reason;
      forgetToken();
      await askForToken(reason);
    }
  }
}

at("leave").addEventListener("click", () => {
  forgetToken();
  location.assign("/");
});
